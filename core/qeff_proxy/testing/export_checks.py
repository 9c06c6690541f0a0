"""Checks of an export's files: graphs, weights and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from safetensors import safe_open

from qeff_proxy.cut.cut_model import site_weights
from qeff_proxy.testing.expectations import expect, needs

if TYPE_CHECKING:
    from qeff_proxy.testing.subject import Subject

#: Operator domains that every ONNX runtime supports.
_DOMAINS = {"", "ai.onnx"}
_GRAPH_TOLERANCE = 1e-4


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


class ExportChecks:
    """The export has the right files, and each weight once."""

    @needs("vocabulary")
    def test_no_vocabulary_sized_tensor_is_in_the_body(self, subject: Subject) -> None:
        """The body, which is compiled, contains no weight of the vocabulary."""
        size = subject.suite.vocabulary(subject.model)
        for name in subject.export.files:
            if name == "vocabulary.safetensors":
                continue
            for tensor, shape in _shapes(subject.export.folder / name).items():
                expect(
                    size not in shape,
                    f"{name} holds {tensor} {list(shape)}, which is as large as the vocabulary",
                    "Keep it out of the part in build_proxy. (If that size is no vocabulary's, "
                    "give the tiny model another vocab_size.)",
                )

    @needs("vocabulary")
    def test_no_vocabulary_sized_constant_is_in_a_graph(self, subject: Subject) -> None:
        """The body does not contain a vocabulary table as a constant or an input either."""
        size = subject.suite.vocabulary(subject.model)
        for part in subject.export.parts:
            if part.weights == "vocabulary.safetensors":
                continue
            graph = onnx.load(subject.export.folder / part.file, load_external_data=False).graph
            found = [one.name for one in graph.initializer if size in one.dims]
            found += [
                node.name
                for node in graph.node
                for attribute in node.attribute
                if attribute.HasField("t") and size in attribute.t.dims
            ]
            found += [spec.name for spec in (*part.inputs, *part.outputs) if size in spec.shape]
            expect(
                not found,
                f"{part.file} has {found[:1]} of the vocabulary's size",
                "Keep it out of the part in build_proxy.",
            )

    @needs("vocabulary")
    def test_the_sites_are_in_the_vocabularys_file(self, subject: Subject) -> None:
        """``vocabulary.safetensors`` holds every parameter of the sites, and no others."""
        held = set(_shapes(subject.export.folder / "vocabulary.safetensors"))
        held -= set(dict(subject.model.named_buffers()))  # a bias behind the head may be one
        own = [site_weights(subject.loaded, site) for site in subject.cut.sites.values()]
        wanted = set.union(*own)
        expect(
            held <= wanted,
            f"vocabulary.safetensors holds {sorted(held - wanted)[:3]}, which is no part of a site",
            "Give parts that are neither embedding nor LM head weights='body' (or a name of their "
            "own), and name a site's parameters in its `tables`.",
        )
        parameters = dict(subject.model.named_parameters(remove_duplicate=False))
        kept = {id(parameters[name]) for name in held}
        lost = sorted(name for name in wanted if id(parameters[name]) not in kept)
        expect(
            not lost,
            f"{lost[:1]} belongs to a site and is in no part",
            "The embedding and lm_head parts must hold what the sites name.",
        )

    def test_every_weight_is_stored_once(self, subject: Subject) -> None:
        """No weight is stored twice, tied ones included: the files have the parameters' bytes."""
        sizes = {id(one): one.numel() * one.element_size() for one in subject.model.parameters()}
        stored = sum(subject.export.files.values())
        expect(
            stored <= sum(sizes.values()) * 1.05 + 20_000,
            f"the weights take {stored} bytes, and the model has {sum(sizes.values())}",
            "Let parts hold the model's own parameters, not copies of them.",
        )

    def test_the_graphs_have_the_names_and_axes_of_the_parts(self, subject: Subject) -> None:
        """Axes that are dynamic in a spec are dynamic in the graph."""
        for part in subject.export.parts:
            graph = onnx.load(subject.export.folder / part.file, load_external_data=False).graph
            for specs, values in ((part.inputs, graph.input), (part.outputs, graph.output)):
                expect(
                    [spec.name for spec in specs] == [value.name for value in values],
                    f"{part.file} has {[v.name for v in values]}, not {[s.name for s in specs]}",
                    "The part's module must return its outputs by the names of its specs.",
                )
                for spec, value in zip(specs, values, strict=True):
                    dims = value.type.tensor_type.shape.dim
                    frozen = [
                        axis
                        for axis, dim in zip(spec.shape, dims, strict=True)
                        if isinstance(axis, str) and dim.HasField("dim_value")
                    ]
                    expect(
                        not frozen,
                        f"the axes {frozen} of {value.name} are fixed in {part.file}",
                        "Take sizes from the tensors as they come, not from Python numbers.",
                    )

    def test_the_graphs_use_standard_operators(self, subject: Subject) -> None:
        """Graphs use only ONNX's own operators, which accelerators' compilers support."""
        for part in subject.export.parts:
            model = onnx.load(subject.export.folder / part.file, load_external_data=False)
            others = sorted(
                {f"{n.domain}.{n.op_type}" for n in model.graph.node}
                - {f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain in _DOMAINS}
            )
            expect(
                not others and not model.functions,
                f"{part.file} uses {others}",
                "Write the part with operations that torch exports to the standard domain.",
            )

    def test_the_graphs_give_what_pytorch_gives(self, subject: Subject) -> None:
        """Every graph was checked at sizes other than those it was traced at."""
        found = subject.export.cut["graphs"]
        expect(
            set(found) == {part.name for part in subject.export.parts}
            and all(value is not None and value <= _GRAPH_TOLERANCE for value in found.values()),
            f"graphs and parts differ: {found}",
            "Avoid Python numbers and branches that depend on shapes in the part's forward.",
        )

    @needs("streams")
    def test_the_layers_are_streamed(self, subject: Subject) -> None:
        """Only the first layers of a checkpoint are loaded; the others' weights are copied."""
        how = subject.export.cut["weights"]
        expect(
            how.startswith("streamed") and "since" not in how,
            f"all layers had to be loaded: {how}",
            "Don't look at values of parameters in build_proxy, nor treat layers differently by "
            "their number. Declare capabilities without `streams` if the model itself does.",
        )

    def test_the_manifest_names_the_plugin(self, subject: Subject) -> None:
        """An export names its plugin, so that a change of the plugin leads to a new export."""
        made_by = subject.export.made_by["plugin"]
        expect(
            made_by["name"] == subject.hooks.plugin,
            f"export.json says {made_by}",
            "Register the plugin under one name.",
        )
