"""Finds the most similar vectors of a book: exactly in small books, with FAISS in large ones."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from .tables import GroupTable

# Up to this number of vectors, all are compared. More vectors are searched with FAISS.
MAX_EXACT = 200_000
# Queries that are compared together.
SEARCH_BLOCK = 256
# Vectors that are added to an index together.
ADD_BLOCK = 16_384
# Examples per cluster from which the clusters are computed, and iterations of k-means.
CLUSTER_SAMPLE, CLUSTER_ITERATIONS = 20, 6
# Vectors from which the rounding is computed.
ROUNDING_SAMPLE = 16_384
# Clusters that are searched for each query.
NUM_PROBES = 256
# Dimensions that are rounded together, to one of 2 ** `NUM_BITS` vectors.
ROUNDED_SIZE, NUM_BITS = 4, 4
# The index compares rounded vectors. It returns this many times the wanted rows, which are then compared exactly.
OVERSAMPLING = 10


class ExactSearch:
    """Compares each query with all vectors.

    Args:
        vectors: `[vectors, width]`, unit vectors in half precision; zeros for missing ones.
    """

    def __init__(self, vectors: torch.Tensor):
        # Converting the vectors takes longer than comparing them.
        self.vectors, self.is_missing = vectors.float(), ~vectors.any(dim=1)

    def __call__(self, queries: torch.Tensor, number: int, excluded: torch.Tensor, groups: GroupTable) -> list:
        """Return the rows of the most similar vectors for each query, the most similar first.

        Args:
            queries: `[queries, width]`, unit vectors. A zero vector finds nothing.
            number: Maximum number of rows.
            excluded: `[queries]`, the number of the group that is left out; -1 for none.
            groups: The groups of the vectors.
        """
        number, found = min(number, len(self.vectors)), []
        for block, own in zip(queries.split(SEARCH_BLOCK), excluded.split(SEARCH_BLOCK), strict=True):
            similarities = (block @ self.vectors.T).masked_fill(self.is_missing, -torch.inf)
            if (own >= 0).any():
                similarities.masked_fill_(groups.numbers == own[:, None], -torch.inf)
            values, rows = similarities.topk(number, dim=1)
            values = values.masked_fill(~block.any(dim=1, keepdim=True), -torch.inf)
            pairs = zip(values.tolist(), rows.tolist(), strict=True)
            found += [[row for value, row in zip(*pair) if value > -torch.inf] for pair in pairs]
        return found


class Clusters:
    """Clusters of similar vectors (spherical k-means).

    Args:
        centroids: `[clusters, width]`.
        members: `[vectors]`, the cluster of each vector; -1 for missing vectors.
    """

    def __init__(self, centroids: torch.Tensor, members: torch.Tensor):
        self.centroids, self.members = centroids, members

    @classmethod
    def from_vectors(cls, vectors: torch.Tensor) -> "Clusters":
        """Compute the clusters of vectors, as [`ExactSearch`] takes them. At least one is present.

        Raises:
            ImportError: `faiss` is not installed.
        """
        faiss = import_faiss()
        present = vectors.any(dim=1).nonzero().flatten()
        number = min(_num_clusters(len(present)), len(present))
        sample = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(0))]
        sample = vectors[sample[: CLUSTER_SAMPLE * number]].float().numpy()
        kmeans = faiss.Kmeans(
            vectors.shape[1], number, niter=CLUSTER_ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1
        )
        kmeans.train(sample)
        return cls(torch.from_numpy(kmeans.centroids).half(), torch.empty(0, dtype=torch.int32)).extended(vectors)

    @property
    def is_outdated(self) -> bool:
        """Whether there are so many more vectors that each cluster has become large."""
        return _num_clusters(int((self.members >= 0).sum())) > 2 * len(self.centroids)

    def extended(self, vectors: torch.Tensor) -> "Clusters":
        """Return the same clusters with more vectors."""
        members = torch.full((len(vectors),), -1, dtype=torch.int32)
        centroids = self.centroids.float()
        for start in range(0, len(vectors), ADD_BLOCK):
            block = vectors[start : start + ADD_BLOCK].float()
            nearest = (block @ centroids.T).argmax(dim=1).int()
            members[start : start + len(block)] = nearest.where(block.any(dim=1), -1)
        return Clusters(self.centroids, torch.cat([self.members, members]))

    def select(self, rows: Sequence[int]) -> "Clusters":
        """Return the same clusters with some of the vectors."""
        return Clusters(self.centroids, self.members[rows])


class ClusterSearch:
    """Compares each query with the vectors of the nearest clusters.

    The FAISS index is an inverted file with product quantisation.

    Args:
        vectors: As in [`ExactSearch`].
        clusters: Their clusters.

    Raises:
        ImportError: `faiss` is not installed.
    """

    def __init__(self, vectors: torch.Tensor, clusters: Clusters):
        faiss = import_faiss()
        self.vectors, self._rotation = vectors, _random_rotation(vectors.shape[1])
        centroids, width = self._rotate(clusters.centroids), self._rotation.shape[1]
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(centroids)
        index = faiss.IndexIVFPQ(
            quantizer, width, len(centroids), width // ROUNDED_SIZE, NUM_BITS, faiss.METRIC_INNER_PRODUCT
        )
        present = (clusters.members >= 0).nonzero().flatten()
        index.train(self._rotate(vectors[present[:: -(-len(present) // ROUNDING_SAMPLE)]]))
        for rows in present.split(ADD_BLOCK):
            block, ids = self._rotate(vectors[rows]), rows.numpy()
            members = clusters.members[rows].long().numpy()
            # The clusters are known, so that loading a book takes seconds instead of minutes.
            index.add_core(len(rows), *map(faiss.swig_ptr, (block, ids, members)))
        self.index = faiss.IndexIVFPQFastScan(index)
        # The new index has a copy of the vectors.
        index.reset()
        self.index.nprobe = min(NUM_PROBES, len(centroids))

    def __call__(self, queries: torch.Tensor, number: int, excluded: torch.Tensor, groups: GroupTable) -> list:
        """Return the rows of the most similar vectors for each query; see [`ExactSearch.__call__`]."""
        found: list[list[int]] = [[] for _ in queries]
        # The most similar vectors may all be of the excluded group.
        wanted = OVERSAMPLING * number + max(groups.sizes[excluded[excluded >= 0]].tolist(), default=0)
        _, nearest = self.index.search(self._rotate(queries), min(wanted, self.index.ntotal))
        is_usable = (nearest >= 0) & queries.any(dim=1, keepdim=True).numpy()
        is_usable &= groups.numbers.numpy()[nearest] != excluded[:, None].numpy()
        # NumPy is faster than PyTorch for few vectors.
        vectors = self.vectors.numpy()
        for query, (rows, usable) in enumerate(zip(nearest, is_usable, strict=True)):
            rows = rows[usable]
            similarities = vectors[rows].astype(np.float32) @ queries[query].numpy()
            found[query] = rows[np.argsort(-similarities, kind="stable")[:number]].tolist()
        return found

    def _rotate(self, vectors: torch.Tensor) -> np.ndarray:
        return (vectors.float() @ self._rotation).numpy()


def _num_clusters(num_vectors: int) -> int:
    return max(1, round(4 * num_vectors**0.5))


def _random_rotation(width: int) -> torch.Tensor:
    """Return a rotation `[width, padded width]`, after which all dimensions matter alike, as the rounding assumes."""
    padded = -(-width // ROUNDED_SIZE) * ROUNDED_SIZE
    random = torch.randn(padded, padded, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random)[0][:width]


def check_faiss(num_examples: int) -> None:
    """Check that a book of this size can be searched.

    Raises:
        ImportError: `faiss` is needed and not installed.
    """
    if num_examples > MAX_EXACT:
        import_faiss()


def import_faiss() -> ModuleType:
    """Return the module `faiss`.

    Raises:
        ImportError: It is not installed. The message says how to install it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'The book is searched with FAISS, which is not installed: pip install "optsg[book]"'
        ) from error
    return faiss
