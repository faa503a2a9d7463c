"""Graphs of different size, laid out flat as in PyTorch Geometric, and moved as whole graphs.

    state = crowd.ragged({"x": x, "edge_index": pairs, "edge_attr": kinds, "batch": graph_of_every_node})
    out = state.like(x0=..., edge_logits=...)          # the network's output, laid out the same way

A name that begins with "edge" has an entry for every edge, `edge_index` is `[2, E]`, names given as `graphs`
have one for every graph, and everything else one for every node.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

INDEX, BATCH, POINTER = "edge_index", "batch", "ptr"


@dataclass(frozen=True)
class Ragged:
    """Flat tensors of graphs, row g of a crowd being graph g.

    tensors: by name. batch: the graph of every node, rising. edges: `[2, E]` nodes of every edge, edges of a
    graph together, or None. per_graph: names of tensors with one entry for each graph. graphs: their number.
    """

    tensors: Mapping[str, Tensor]
    batch: Tensor
    edges: Tensor | None
    per_graph: frozenset[str]
    graphs: int

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def sizes(self) -> Tensor:
        """Return the nodes of every graph, `[rows]`."""
        return torch.bincount(self.batch, minlength=self.graphs)

    def like(self, **tensors: Tensor) -> Ragged:
        """Return other tensors of the same graphs, such as what a network says of them."""
        found = replace(self, tensors=tensors)
        found.check()
        return found

    def updated(self, **tensors: Tensor) -> Ragged:
        """Return the same graphs with some tensors replaced."""
        return self.like(**{**self.tensors, **tensors})

    def check(self) -> None:
        """Raise ValueError, with its name, for a tensor that does not fit nodes, edges or graphs."""
        for name, value in self.tensors.items():
            kind, wanted = self._kind(name)
            if not value.ndim or len(value) != wanted:
                raise ValueError(
                    f"ragged {name!r} has first size {len(value) if value.ndim else 'none'}, but there are "
                    f"{wanted} {kind}: names that begin with 'edge' count edges, those in graphs=(...) "
                    "graphs, all others nodes"
                )

    def _kind(self, name: str) -> tuple[str, int]:
        if name in self.per_graph:
            return "graphs", self.graphs
        if name.startswith("edge"):
            return "edges", 0 if self.edges is None else self.edges.shape[1]
        return "nodes", len(self.batch)

    def moved(self, source: Tensor) -> Ragged:
        """Return the graphs with graph g from graph source[g], flat tensors built anew."""
        source = source.to(self.batch.device)
        nodes, new_batch = _picked(self.batch, source, self.graphs)
        edges, pairs = None, None
        if self.edges is not None:
            of_edge = self.batch[self.edges[0]]
            edges, row = _picked(of_edge, source, self.graphs)
            pairs = self.edges[:, edges] + self._shift(source)[row]
        picked = {"nodes": nodes, "edges": edges, "graphs": source}
        tensors = {name: value[picked[self._kind(name)[0]]] for name, value in self.tensors.items()}
        return replace(self, tensors=tensors, batch=new_batch, edges=pairs)

    def _shift(self, source: Tensor) -> Tensor:
        """Return by how much the node numbers of every new graph grow, `[rows]`."""
        sizes = self.sizes
        old = sizes.cumsum(0) - sizes
        new = sizes[source].cumsum(0) - sizes[source]
        return new - old[source]


def _picked(owner: Tensor, source: Tensor, graphs: int) -> tuple[Tensor, Tensor]:
    """Return which entries make up the new graphs, in order, and the new graph of each.

    owner: graph of every entry, rising.
    """
    counts = torch.bincount(owner, minlength=graphs)
    start = counts.cumsum(0) - counts
    taken = counts[source]
    row = torch.repeat_interleave(torch.arange(len(source), device=owner.device), taken)
    place = torch.arange(len(row), device=owner.device) - (taken.cumsum(0) - taken)[row]
    return start[source][row] + place, row


def ragged(batch: Any, rows: int, particles: int, graphs: Iterable[str] = ()) -> Ragged:
    """Return graphs as a crowd of `rows` can move them; see `Crowd.ragged`."""
    given = dict(batch.to_dict()) if hasattr(batch, "to_dict") else dict(batch)
    if BATCH not in given:
        raise ValueError("a ragged state needs 'batch', the graph of every node: see torch_geometric's Batch")
    owner, edges = given.pop(BATCH), given.pop(INDEX, None)
    given.pop(POINTER, None)
    others = [name for name, value in given.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"ragged {others[0]!r} is no tensor: leave it out of the batch, it cannot be moved")
    made = Ragged(given, owner, edges, frozenset(graphs), rows)
    _check_owners("batch", owner, rows)
    if edges is not None:
        _check_owners("edge_index, by graph,", owner[edges[0]], rows)
        if bool((owner[edges[0]] != owner[edges[1]]).any()):
            raise ValueError("edge_index joins nodes of two graphs: every edge must stay within one")
    made.check()
    _tell_sizes(made.sizes.reshape(-1, particles))
    return made


def _check_owners(name: str, owner: Tensor, rows: int) -> None:
    if len(owner) and (int(owner.max()) >= rows or int(owner.min()) < 0):
        raise ValueError(f"{name} counts graphs up to {int(owner.max())}, but the crowd has {rows} rows")
    if bool((owner.diff() < 0).any()):
        raise ValueError(f"{name} must rise: put the nodes and the edges of a graph together, graph by graph")


def _tell_sizes(sizes: Tensor) -> None:
    """Warn where the graphs of a group differ in size, since selection then chooses sizes too."""
    uneven = torch.nonzero((sizes != sizes[:, :1]).any(1)).reshape(-1).tolist()
    if uneven:
        own = sorted(set(sizes[uneven[0]].tolist()))
        warnings.warn(
            f"the graphs of group {uneven[0]} have {own[0]} to {own[-1]} nodes, so selection chooses sizes "
            "too: give all graphs of a group one size to compare like with like",
            stacklevel=4,
        )
