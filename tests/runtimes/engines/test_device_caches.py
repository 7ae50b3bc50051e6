"""Caches on the device: zeros, content that stays, and copies of slots."""

from __future__ import annotations

import numpy as np
import pytest
from mock_cuda import MockDriver

from llmc.errors import LlmcError
from llmc.runtimes.artifact.manifest import CacheSpec
from llmc.runtimes.engines.device_caches import DeviceCaches

ALIGNMENT = 256
SPECS = [CacheSpec("static", 2, 8, 4, 32, "fp16"), CacheSpec("static", 1, 16, 16, 32, "bf16")]


def opened(count: int, specs: list[CacheSpec] = SPECS, memory: int = 1 << 20) -> tuple[MockDriver, int, DeviceCaches]:
    driver = MockDriver(memory)
    stream = driver.create_stream()
    caches = DeviceCaches(driver, stream, specs, ALIGNMENT)
    caches.open(count)
    return driver, stream, caches


def content(driver: MockDriver, caches: DeviceCaches, index: int, slot: int) -> np.ndarray:
    """Return the numbers of a slot of a tensor, [heads, length, width], to read and to write."""
    tensor = caches.tensors[index]
    return driver.view("device", caches.address(index, slot), tensor.nbytes).view(np.float16).reshape(tensor.shape)


def test_names_and_sizes() -> None:
    driver, _, caches = opened(3)
    assert [(tensor.past, tensor.present) for tensor in caches.tensors[1:3]] == [
        ("past_key_values.0.value", "present.0.value"),
        ("past_key_values.1.key", "present.1.key"),
    ]
    assert [tensor.shape for tensor in caches.tensors] == [(2, 32, 8), (2, 32, 4), (1, 32, 16), (1, 32, 16)]
    assert caches.contiguous and driver.used == 3 * sum(spec.nbytes for spec in SPECS)


def test_new_slots_are_zeros_and_old_ones_keep_their_content() -> None:
    driver, _, caches = opened(2)
    for index in range(4):
        for slot in range(2):
            assert not content(driver, caches, index, slot).any()
            content(driver, caches, index, slot)[:] = 10 * index + slot + 1
    for count in (5, 2, 4):
        caches.open(count)
        for index in range(4):
            kept = [float(content(driver, caches, index, slot).max()) for slot in range(count)]
            assert kept == [10 * index + 1, 10 * index + 2, *[0] * (count - 2)]
            assert (content(driver, caches, index, 0) == 10 * index + 1).all()
    caches.open(1)
    caches.open(2)
    assert content(driver, caches, 0, 0).all() and not content(driver, caches, 0, 1).any()


def test_the_first_positions_of_a_slot_are_copied() -> None:
    driver, stream, caches = opened(3)
    for index in range(4):
        content(driver, caches, index, 2)[:] = np.arange(1, 33)[:, None]
    caches.copy_slot(2, 0, 5)
    caches.copy_slot(1, 1, 5)
    caches.copy_slot(2, 1, 0)
    driver.synchronize(stream)
    for index in range(4):
        copied = content(driver, caches, index, 0)
        assert (copied[:, :5] == np.arange(1, 6)[:, None]).all() and not copied[:, 5:].any()
        assert not content(driver, caches, index, 1).any()
    caches.copy_slot(2, 1, 1000)
    driver.synchronize(stream)
    assert (content(driver, caches, 3, 1) == content(driver, caches, 3, 2)).all()


def test_slots_begin_where_tensorrt_wants_them() -> None:
    _, _, caches = opened(3, [CacheSpec("static", 1, 6, 6, 31, "fp16")])
    assert not caches.contiguous
    assert all(caches.address(index, slot) % 256 == 0 for index in range(2) for slot in range(3))
    assert len({caches.address(0, slot) for slot in range(3)}) == 3


def test_too_little_memory_changes_nothing() -> None:
    driver, _, caches = opened(2, memory=4 * sum(spec.nbytes for spec in SPECS))
    content(driver, caches, 0, 1)[:] = 7
    used, live = driver.used, driver.live
    with pytest.raises(LlmcError, match="CUDA_MEMORY"):
        caches.open(3)  # there is room for some of the tensors
    assert (driver.used, driver.live) == (used, live) and (content(driver, caches, 0, 1) == 7).all()
    caches.free()
    caches.free()
    assert driver.live == {"stream": 1}
