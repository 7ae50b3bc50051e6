"""The interface of a target: everything that differs between runtimes, behind one object. Imports no torch.

To add a target, add a folder beside this file whose `target.py` defines `TARGET`, and the engine that runs its
artifacts in `runtimes/engines/`; nothing else names it. A package outside llmc registers one through the entry points
`llmc.targets` and `llmc.engines`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ...errors import LlmcError, UsageError
from ...passes.quantize.schemes import Grid, Scheme
from ...runtimes.artifact.manifest import DtypeName
from ..config import CompileConfig
from ..options import invalid

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...passes.base import Pass
    from ...passes.quantize.quantization_plan import Choice, QuantizationPlan
    from ...runtimes.artifact.manifest import Manifest, Phase
    from ...runtimes.engines.base import LayerEngine

Watch = Callable[[str], None]
PhaseWatch = Callable[[str, int, int], None]
"""Called with a phase, and how many of its steps are done of how many."""


@dataclass(frozen=True)
class Promotion:
    """Sensitive weights of 4-bit linears are stored in more bits.

    Attributes:
        grid: what they become.
        target_loss: promote until the remaining weights are predicted to cost so many nats a token,
        share: but no more than this share of all numbers of linears.
    """

    grid: Grid
    target_loss: float
    share: float


@dataclass(frozen=True)
class InputExemption:
    """Kernels that quantize the inputs of linears by token; the most sensitive linears keep exact inputs.

    Attributes:
        target_loss: exempt linears until the others are predicted to cost so many nats a token,
        share: but no more than this share of all numbers of linears.
    """

    target_loss: float
    share: float


@dataclass(frozen=True)
class KernelFacts:
    """Limits and preferences of a target's kernels.

    Attributes:
        dtypes: dtypes that its kernels compute in, the default first.
        schemes: quantization schemes by name, with the grids that suit its kernels.
        stored: the scheme for codes that a quantized checkpoint brings.
        cache_kinds: "ring" and "static", as far as it has them, the default first.
        cache_codes: formats of 8-bit KV caches.
        promotion: what sensitive 4-bit weights become; None if there is nothing better than 4 bits.
        packages: modules that compiling ("compile") and running ("run") need beside torch and transformers.
        sparse: its kernels make use of zeros.
        emulated: schemes that run without kernels of their own, and what to say about each.
        refused: schemes that it can't run, and why, where there is more to say than that.
        where: what these facts are about, to follow the target's name in a message: " with `device` cuda".
    """

    dtypes: tuple[str, ...]
    schemes: Mapping[str, Scheme]
    stored: Scheme
    cache_kinds: tuple[str, ...] = ("ring", "static")
    cache_codes: tuple[str, ...] = ()
    promotion: Promotion | None = None
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"compile": (), "run": ()})
    sparse: bool = False
    emulated: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Lowered:
    """The result of lowering.

    Attributes:
        phases: how many tokens per call each of its graphs serves, by the graph's name; at least "step".
        section: the target's own part of the manifest: an instance of a dataclass of plain data.
        requires: what the engine needs: a range of versions by module, such as `{"numpy": ">=1.26"}`.
    """

    phases: Mapping[str, Phase]
    section: Any
    requires: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table about an artifact.

    Attributes:
        columns: their names; empty for a list of facts, whose rows are a name and a text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


class Target(ABC):
    """A runtime that llmc compiles for.

    Class attributes:
        name: as `--target` and the manifest call it.
        summary: one line for `--help` and `llmc doctor`.
        options: dataclass of the options that only this target has, declared with `compiler.options.option`.
        facts: what its kernels can run, with its own options' defaults.
        gate_opener: the function, as `module:name`, that opens an artifact for the gate while it is compiled, where the
            engine may not run on the compiling machine; None: its engine.
        finalizes: `finalize` does something.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type]
    facts: ClassVar[KernelFacts]
    gate_opener: ClassVar[str | None] = None
    finalizes: ClassVar[bool] = False

    def options_of(self, config: CompileConfig) -> Any:
        """Return this target's own options in a config."""
        given = config.target_options
        if given is not None and not isinstance(given, self.options):
            kind = type(given).__name__
            raise invalid(f"target_options is a {kind}", f"Target {self.name} takes {self.options.__name__}.")
        return self.options() if given is None else given

    def facts_for(self, config: CompileConfig) -> KernelFacts:
        """Return what the kernels can run that this target's own options choose. The packages are those of `facts`."""
        return self.facts

    def gate_opener_for(self, manifest: Manifest) -> str | None:
        """Return `gate_opener` for an artifact."""
        return self.gate_opener

    def dtype(self, config: CompileConfig) -> DtypeName:
        """Return the dtype to compute in."""
        chosen = config.dtype or self.facts_for(config).dtypes[0]
        return cast(DtypeName, chosen)

    def cache_kind(self, config: CompileConfig) -> str:
        """Return the kind of KV cache."""
        return config.kv_cache or self.facts_for(config).cache_kinds[0]

    def scheme(self, config: CompileConfig) -> Scheme | None:
        """Return how weights are quantized; None if they stay."""
        if config.quantize is None:
            return None
        chosen = self.facts_for(config).schemes[config.quantize]
        return chosen if config.group_size is None else chosen.with_group(config.group_size)

    def check(self, config: CompileConfig) -> None:
        """Refuse what this target can't do, before any work, and say what would work.

        Raises:
            UsageError: DTYPE_SLOW, SCHEME_INVALID or CONFIG_INVALID.
        """
        facts = self.facts_for(config)
        subject = f"Target {self.name}{facts.where}"
        if (dtype := self.dtype(config)) not in facts.dtypes:
            raise UsageError(
                "DTYPE_SLOW",
                f"{subject} has no kernels that compute in {dtype}.",
                f"Set `dtype` to one of {', '.join(facts.dtypes)}.",
            )
        if config.quantize is not None and config.quantize not in facts.schemes:
            why = facts.refused.get(config.quantize, f"{subject} can't run `quantize` {config.quantize}")
            raise invalid(why, _one_of("quantize", facts.schemes))
        if (kind := self.cache_kind(config)) not in facts.cache_kinds:
            raise invalid(f"{subject} has no {kind} `kv_cache`", _one_of("kv_cache", facts.cache_kinds))
        if config.cache_codes is not None and config.cache_codes not in facts.cache_codes:
            raise invalid(
                f"{subject} has no `kv_cache_dtype` {config.cache_codes}",
                _one_of("kv_cache_dtype", ("auto", *facts.cache_codes)),
            )
        if config.quantize is not None:
            self._check_groups(config, facts.schemes[config.quantize])

    def _check_groups(self, config: CompileConfig, scheme: Scheme) -> None:
        if config.group_size is not None:
            sizes = scheme.group_sizes
            takes_groups = scheme.linears is not None and isinstance(scheme.linears.group, int)
            if not takes_groups:
                raise invalid(f"group_size is set, but {scheme.name} has no groups", "Leave out group_size.")
            if isinstance(config.group_size, int) and config.group_size not in sizes:
                raise invalid(f"group_size is {config.group_size}", _one_of("group_size", (*sizes, "channel")))
            scheme = scheme.with_group(config.group_size)  # refuses a grid that no scheme can have
        for override in config.overrides:
            if override.grid is not None:
                scheme.check(override.grid)
        if config.raises and self.facts_for(config).promotion is None and config.raise_share is not None:
            raise invalid(f"Target {self.name} can't store some weights in more bits", "Leave out raise_share.")

    def warnings(self, config: CompileConfig) -> list[str]:
        """Return what the user should know before the work begins."""
        said = []
        facts = self.facts_for(config)
        if config.prune is not None and not facts.sparse:
            said.append(
                f"No kernel of target {self.name} makes use of zeros: `prune` saves neither time nor bytes. It shows "
                "what the zeros cost in quality; drop_layers saves both."
            )
        if config.quantize is not None and config.quantize in facts.emulated:
            said.append(facts.emulated[config.quantize])
        return said

    def has_constant_cache_scales(self, config: CompileConfig) -> bool:
        """Return True if quantized keys and values have constant scales, which a calibration text determines."""
        return False

    def input_exemption(self, config: CompileConfig) -> InputExemption | None:
        """Return how to choose linears whose inputs stay exact; None if no kernel quantizes inputs on its own."""
        return None

    def input_group(self, config: CompileConfig, choice: Choice) -> int | None:
        """Return how many input channels the kernel of a quantized linear quantizes with one scale.

        0 is all channels of a token; None means that the kernel keeps inputs exact.
        """
        return 0 if choice.grid is not None and choice.grid.activation == "int8" else None

    @abstractmethod
    def finishing_passes(
        self, config: CompileConfig, plan: QuantizationPlan | None, exact_inputs: Collection[str]
    ) -> Mapping[str, Sequence[Pass]]:
        """Return, for each graph of the artifact by its name, the passes that make it from the cached program.

        Args:
            plan: what the weights became; None if nothing is quantized.
            exact_inputs: weights of linears whose inputs stay exact.
        """

    @abstractmethod
    def lower(self, graphs: Mapping[str, Program], folder: Path, config: CompileConfig, watch: Watch) -> Lowered:
        """Write the graphs and their weights into `folder`.

        Args:
            watch: called with each weight's name before it is computed.
        """

    def missing(self, step: Literal["compile", "run"]) -> str | None:
        """Return what this machine lacks for a step beside the packages of the facts; None: nothing."""
        return None

    def missing_for(self, manifest: Manifest) -> str | None:
        """Return what this machine lacks to run an artifact whose gate had another opener; None: nothing."""
        return self.missing("run")

    def check_program(self, program: Program, config: CompileConfig) -> None:
        """Refuse an optimized program that this target can't run, before anything is spent on its weights.

        It is called for the program in float32, and again for the one in the dtype computed in.

        Raises:
            LlmcError: names the op and the layer.
        """
        return

    def finalize(self, folder: Path, manifest: Manifest, options: Any, watch: PhaseWatch) -> Manifest:
        """Build what an artifact that passed the gate still lacks, such as engines for certain GPUs.

        `llmc compile` and `llmc finalize` call it, for targets that have `finalizes`.

        Args:
            folder: holds the artifact's files; new ones are written beside them.
            options: an instance of the target's own options.

        Returns:
            The manifest that names the new files.
        """
        return manifest

    def tables(self, folder: Path, manifest: Manifest) -> Sequence[Table]:
        """Return what `llmc inspect` shows of this target's own part of an artifact."""
        return ()

    def remarks(self, folder: Path, manifest: Manifest) -> Sequence[str]:
        """Return what the user should know about what `finalize` built, one sentence each."""
        return ()

    def plan_tables(self, program: Program) -> Sequence[Table]:
        """Return what `llmc plan` adds for this target.

        Args:
            program: a canonical program in the dtype computed in, with weights that were not read.
        """
        return ()

    def write_metadata_files(self, program: Program, folder: Path) -> None:
        """Write files for other tools beside the artifact's own. `folder` holds config.json and the tokenizer."""
        return

    def open_layers(self, folder: Path, *, threads: int | None = None) -> LayerEngine:
        """Open an artifact so that it also returns the outputs of its layers.

        Raises:
            LlmcError: LAYERS_UNSUPPORTED if this target can't; NO_LAYER_BORDERS if the artifact has none.
        """
        raise LlmcError(
            "LAYERS_UNSUPPORTED",
            f"Artifacts of target {self.name} can't return the outputs of their layers.",
            "Measure without --per-layer.",
        )


def _one_of(option: str, choices: Collection[object]) -> str:
    return f"Set `{option}` to one of {', '.join(map(str, choices))}."
