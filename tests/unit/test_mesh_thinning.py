import numpy as np

from vlarl_ray.envs.mesh_thinning import cluster_faces


def sphere(num: int = 40) -> tuple[np.ndarray, np.ndarray]:
    theta, phi = np.meshgrid(np.linspace(0, np.pi, num), np.linspace(0, 2 * np.pi, num), indexing="ij")
    points = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1).reshape(-1, 3)
    corner = np.arange(num * num).reshape(num, num)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[:-1, 1:], corner[1:, 1:]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)])
    return points.astype(np.float32), faces.astype(np.int32)


def test_thinned_sphere_keeps_its_shape_with_far_fewer_triangles():
    points, faces = sphere()
    thin = cluster_faces(points, faces, 0.3)
    assert len(thin) < len(faces) / 5
    corners = points[thin]
    area = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum()
    assert abs(area / (4 * np.pi) - 1) < 0.1


def test_no_triangle_is_degenerate_or_drawn_twice():
    points, faces = sphere()
    thin = cluster_faces(points, faces, 0.3)
    assert all(len(set(face)) == 3 for face in thin.tolist())
    assert len({tuple(sorted(face)) for face in thin.tolist()}) == len(thin)


def test_a_cell_smaller_than_every_edge_changes_nothing():
    points = np.eye(3, dtype=np.float32)
    faces = np.array([[0, 1, 2]], dtype=np.int32)
    assert cluster_faces(points, faces, 1e-3).tolist() == faces.tolist()
