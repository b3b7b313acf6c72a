"""Cheaper copies of a MuJoCo model, for drawing only: coarser meshes and smaller textures. Physics never sees them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def thin_for_drawing(model: Any, *, cell_m: float, max_texture_size: int, min_faces: int = 400) -> Any:
    """Copy a model with coarser meshes and smaller textures.

    Args:
        model: MjModel; left as it is.
        cell_m: Vertices of a mesh that fall in one cube of this side become one.
        max_texture_size: Textures are averaged down until their width is at most this, pixels.
        min_faces: Meshes with fewer triangles are kept, as most of them are the objects a task is about.

    Returns:
        An MjModel to make an `MjrContext` from.
    """
    thin = copy.copy(model)
    for mesh in np.flatnonzero(thin.mesh_facenum >= min_faces):
        _thin_mesh(thin, int(mesh), cell_m)
    for texture in range(thin.ntex):
        _shrink_texture(thin, texture, max_texture_size)
    return thin


def cluster_faces(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], cell_m: float
) -> Int[np.ndarray, "G 3"]:
    """Merge the vertices of each grid cell, and drop the triangles that collapse or repeat.

    A cell's vertices move to the one among them that is nearest to their mean, so that no new vertex is needed.

    Source:
        Vertex clustering: Rossignac & Borrel 1993, "Multi-resolution 3D approximations for rendering complex scenes".
    """
    cells = np.floor(vertices / cell_m).astype(np.int64)
    _, cell_of = np.unique(cells, axis=0, return_inverse=True)
    cell_of = cell_of.ravel()
    num_cells = int(cell_of.max()) + 1
    sums = np.stack([np.bincount(cell_of, vertices[:, axis], num_cells) for axis in range(3)], axis=1)
    means = sums / np.bincount(cell_of, minlength=num_cells)[:, None]
    distance = np.square(vertices - means[cell_of]).sum(axis=1)
    farthest_first = np.argsort(-distance, kind="stable")
    representative = np.empty(num_cells, dtype=np.int64)
    representative[cell_of[farthest_first]] = farthest_first  # the last write, of the nearest vertex, stays
    merged = representative[cell_of[faces]]
    a, b, c = merged.T
    merged = merged[(a != b) & (b != c) & (a != c)]
    _, first = np.unique(np.sort(merged, axis=1), axis=0, return_index=True)
    return merged[np.sort(first)].astype(faces.dtype)


def _thin_mesh(model: Any, mesh: int, cell_m: float) -> None:
    face_start, num_faces = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
    vertex_start, num_vertices = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
    faces = model.mesh_face[face_start : face_start + num_faces].copy()
    thinned = cluster_faces(model.mesh_vert[vertex_start : vertex_start + num_vertices], faces, cell_m)
    kept = slice(face_start, face_start + len(thinned))
    for name in ("mesh_facenormal", "mesh_facetexcoord"):
        corner_ids = getattr(model, name)
        of_vertex = np.zeros(num_vertices, dtype=corner_ids.dtype)
        of_vertex[faces.ravel()] = corner_ids[face_start : face_start + num_faces].ravel()
        corner_ids[kept] = of_vertex[thinned]
    model.mesh_face[kept] = thinned
    model.mesh_facenum[mesh] = len(thinned)


def _shrink_texture(model: Any, texture: int, max_size: int) -> None:
    width, height = int(model.tex_width[texture]), int(model.tex_height[texture])
    channels, start = int(model.tex_nchannel[texture]), int(model.tex_adr[texture])
    factor = 1
    while width // factor > max_size and width % (2 * factor) == 0 and height % (2 * factor) == 0:
        factor *= 2
    if factor == 1:
        return
    pixels = model.tex_data[start : start + width * height * channels]
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    small = np.round(blocks.mean(axis=(1, 3))).astype(np.uint8).ravel()
    model.tex_data[start : start + len(small)] = small
    model.tex_width[texture], model.tex_height[texture] = width // factor, height // factor
