"""The engine of target "trt": a plan of TensorRT over caches that it writes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ....errors import LlmcError, UsageError
from ...artifact.manifest import Manifest
from ...cuda.driver import Driver
from ...cuda.libcuda import open_driver
from ..batch import Batch, check_slots
from ..device_caches import DeviceCaches
from ..logits import HostLogits
from ..runs import Run, plan_runs
from ..spec import EngineSpec
from .library import TensorRt, find_library
from .open_plan import OpenPlan, WantedProfile
from .plans import choose_plan
from .profile import ProfileRunner
from .section import ALIGNMENT, DECODE, PREFILL, PROFILES, Library, Plan, read_section

INPUTS, LOGITS = ("input_ids", "starts", "rows"), "logits"
# Compiled kernels are kept after so many runs: the first ones compile most, and a process may end without `close`.
_STORE_AFTER = (2, 64)


class TensorRtEngine:
    """An artifact of target "trt"; see `Engine`.

    Args:
        threads: not used.
        driver: the GPU's driver; by default that of the first GPU.
        find: returns an installed library; by default `find_library`.

    Attributes:
        profiles: by name, what runs it.
        around_run: see `ReportsRuns`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        slots: int = 1,
        driver: Driver | None = None,
        find: Callable[[Library], TensorRt] | None = None,
    ) -> None:
        # A machine without a GPU is told so, whatever else it lacks.
        self._driver = open_driver() if driver is None else driver
        self._driver.make_current()
        section = read_section(manifest)
        plan, library = choose_plan(section, self._driver.device, folder, find or find_library)
        self.spec = EngineSpec(
            vocab_size=manifest.model.vocab_size,
            max_seq_len=manifest.max_seq_len,
            device=f"cuda:{self._driver.device.index}",
            platform=(
                self._driver.device.name,
                f"CUDA {self._driver.device.driver}",
                f"{library.name} {library.version}",
            ),
        )
        self.around_run: Callable[[Sequence[int]], AbstractContextManager[object]] = nullcontext
        self.slots = self.runs = 0
        self.profiles: dict[str, ProfileRunner] = {}
        self._sizes = section.profiles
        self._logits = np.empty((0, manifest.model.vocab_size), np.float32)
        self._is_open = True
        self._plan: OpenPlan | None = None
        self._stream = self._driver.create_stream()
        self._caches = DeviceCaches(self._driver, self._stream, manifest.caches, ALIGNMENT)
        try:
            self._open(folder, manifest, plan, library)
            self.open_slots(slots)
        except BaseException:
            self.close()
            raise

    def open_slots(self, count: int) -> None:
        self._check_open()
        for profile in self.profiles.values():
            profile.forget()
        self._caches.open(count)
        self.slots = count

    def forward(self, batch: Batch) -> HostLogits:
        self._check_open()
        batch.check(self.spec, self.slots)
        runs = [one for run in plan_runs(batch, self._sizes[PREFILL].tokens) for one in self._split(run)]
        if len(runs) == 1 and np.array_equal(runs[0].target, np.arange(len(batch.wanted))):
            return HostLogits(self._run(batch, runs[0]))
        logits = self._buffer(len(batch.wanted))
        for run in runs:
            values = self._run(batch, run)
            logits[run.target[run.target >= 0]] = values[run.target >= 0]
        return HostLogits(logits)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._check_open()
        check_slots(np.array([source, target]), self.slots)
        self._caches.copy_slot(source, target, length)

    def close(self) -> None:
        if not self._is_open:
            return
        self.slots, self._is_open = 0, False
        self._driver.make_current()
        # After a failure of the GPU, nothing can be freed there, but what the process holds still is.
        with suppress(LlmcError), ExitStack() as last_first:
            last_first.callback(self._driver.destroy_stream, self._stream)
            last_first.callback(self._caches.free)
            if self._plan is not None:
                last_first.callback(self._plan.close)
                last_first.callback(self._plan.store_cache)
            for profile in self.profiles.values():
                last_first.callback(profile.free)
            self._driver.synchronize(self._stream)

    def _open(self, folder: Path, manifest: Manifest, plan: Plan, library: TensorRt) -> None:
        caches = [name for tensor in self._caches.tensors for name in (tensor.past, tensor.present)]
        sizes = {name: self._sizes[name] for name in PROFILES}
        self._plan = OpenPlan(
            folder / plan.file,
            manifest.files[plan.file].sha256,
            library,
            self._driver,
            self._stream,
            tensors=[*INPUTS, LOGITS, *caches],
            profiles=[WantedProfile(size.batch, size.tokens, name == DECODE) for name, size in sizes.items()],
        )
        for index, (name, size) in enumerate(sizes.items()):
            self.profiles[name] = ProfileRunner(
                self._plan,
                index,
                self._driver,
                self._stream,
                self._caches,
                batch=size.batch,
                tokens=size.tokens,
                vocab_size=self.spec.vocab_size,
                captures=name == DECODE and not self._plan.captures,
            )

    def _split(self, run: Run) -> Iterator[Run]:
        """Cut a run of several sequences into runs that the plan takes."""
        count, length = run.tokens.shape
        most = self._sizes[self._profile(length)].batch if self._caches.contiguous else 1
        if count <= most:
            yield run
            return
        target = run.target.reshape(count, -1)
        for first in range(0, count, most):
            part = slice(first, first + most)
            yield replace(
                run,
                tokens=run.tokens[part],
                ends=run.ends[part],
                slot=run.slot + first,
                target=target[part].reshape(-1),
            )

    def _profile(self, length: int) -> str:
        """Return the name of the profile for this many new tokens of a sequence."""
        return DECODE if length <= self._sizes[DECODE].tokens else PREFILL

    def _run(self, batch: Batch, run: Run) -> np.ndarray:
        """Run tokens; return the logits of the wanted ones, [B * W, V]."""
        length = run.tokens.shape[1]
        # A plan returns the logits of one token at least.
        rows = run.wanted if len(run.wanted) else np.array([length - 1])
        profile = self.profiles[self._profile(length)]
        with self.around_run(run.tokens_per_sequence):
            logits = profile.run(batch.tokens[run.tokens], run.ends - length, rows, run.slot)
        self.runs += 1
        if self._plan is not None and self.runs in _STORE_AFTER:
            self._plan.store_cache()
        return logits if len(run.wanted) else logits[:0]

    def _buffer(self, count: int) -> np.ndarray:
        """Return an array [count, V] that is reused: new pages for each call would cost more than writing them."""
        if len(self._logits) < count:
            self._logits = np.empty((count, self.spec.vocab_size), np.float32)
        return self._logits[:count]

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError("ENGINE_CLOSED", "The engine has been closed.", "Load the artifact again.")
        self._driver.make_current()


ENGINE = TensorRtEngine
