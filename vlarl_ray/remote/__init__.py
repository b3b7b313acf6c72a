"""Everything that imports ray: actors, placement, transport, metrics sink."""
