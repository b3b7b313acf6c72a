"""Weights on their way from the learner to servers, by `inference.weight_transport`: time and bytes.

Actors of Ray on one machine: one that has the weights, and servers that end up with a `WeightUpdate` each; nothing is
merged or loaded. `object_store` is as in a run: the learner's actor returns the update, servers take it as an argument.
With `gloo` they get it by broadcast, and it goes into the object store all the same, for servers that might miss it.
`seconds` are from asking the learner for the update until the last server has it; each transport in turn.

Usage: python -m benchmarks.publication [--servers 2] [--mib 4 64 256] [--rounds 7] [--no-save]
"""

import argparse
import statistics
import time

import numpy as np
import ray

from benchmarks._results import write_result
from vlarl_ray.remote.transport import RayTransport
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.channel import Receiver, Sender
from vlarl_ray.weights.delivery import BroadcastDelivery, ObjectStoreDelivery
from vlarl_ray.weights.update import WeightUpdate

TIMEOUT_S = 120.0


class Learner:
    """Has weights, and sends them."""

    def __init__(self, mib):
        rng, side = np.random.default_rng(0), 1024
        pairs = [rng.standard_normal((2, side, 32), np.float32) for _ in range(mib * 4)]  # of 1/4 MiB each
        self.adapters = {f"layer.{i}.weight": (a.T, b) for i, (a, b) in enumerate(pairs)}
        self.sender = Sender("gloo", "127.0.0.1", device="cpu", timeout_s=TIMEOUT_S)

    def weight_update(self, version, broadcast):
        """Give the weights out; hold them for sending as well where they are to be broadcast."""
        update = WeightUpdate(version=version, lora_scale=1.0, adapters=self.adapters, tensors={})
        if broadcast:
            self.sender.hold(update)
        return update

    def offer_weights(self, version, num_servers, renew):
        """See `LearnerRankActor`."""
        return self.sender.offer(version, num_servers, renew=renew)

    def send_weights(self):
        """See `LearnerRankActor`."""
        self.sender.send()


class Server:
    """Gets weights, and keeps them."""

    def __init__(self):
        self.receiver = Receiver("gloo", device="cpu", timeout_s=TIMEOUT_S)
        self.update = None

    def load(self, update):
        """Take an update from the object store."""
        self.update = update
        return update.num_bytes

    def load_offered(self, offer, rank):
        """Take an update off the broadcast."""
        return self.load(self.receiver.receive(offer, rank))

    def digests(self):
        """Fingerprint what is here."""
        return update_digests(self.update)


def measure(mib, num_servers, rounds):
    transport = RayTransport()
    learner = ray.remote(Learner).options(num_cpus=0).remote(mib)
    servers = [ray.remote(Server).options(num_cpus=0).remote() for _ in range(num_servers)]
    by_name = {
        "object_store": ObjectStoreDelivery(servers, transport),
        "gloo": BroadcastDelivery(learner, servers, transport, deadline_s=TIMEOUT_S, restarts=lambda: 0),
    }
    seconds, first, digests = {name: [] for name in by_name}, {}, []
    for version in range(rounds + 1):
        for name, delivery in by_name.items():
            start = time.perf_counter()
            reference = learner.weight_update.remote(version, name == "gloo")
            ray.wait([reference], fetch_local=False)
            num_bytes = ray.get(delivery.start(version, reference))
            delivery.end(num_failed=0)
            took = time.perf_counter() - start
            if version == 0:
                first[name] = took  # processes meet
            else:
                seconds[name].append(took)
            digests += ray.get([server.digests.remote() for server in servers])
    assert all(digest == digests[0] for digest in digests)
    for actor in (learner, *servers):
        ray.kill(actor)
    return {
        name: {
            "bytes to each server": num_bytes[0],
            "seconds (median)": statistics.median(values),
            "seconds (all)": [round(value, 4) for value in values],
            "seconds of the first": first[name],
        }
        for name, values in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--mib", type=int, nargs="+", default=[4, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    store = 3 * 2**20 * max(args.mib) + 2**27
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=store, logging_level="error")
    figures = {}
    try:
        for mib in args.mib:
            for name, figure in measure(mib, args.servers, args.rounds).items():
                figures[f"{name}, {mib} MiB to {args.servers} servers"] = figure
                print(f"{name:14}{mib:5} MiB {figure}", flush=True)
    finally:
        ray.shutdown()
    if not args.no_save:
        print(write_result("publication", figures))


if __name__ == "__main__":
    main()
