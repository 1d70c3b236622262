"""Execution: which implementation encodes a batch of segments, in which precision, and in how many threads.

On a CPU in float32, and an AxLSTM in bfloat16 too, segments run side by side: each thread takes its share through the
whole encoder. Otherwise torch spreads every operation over all cores, and all of them wait for the slowest hundreds of
times in a forward pass, over pieces of a millisecond. Segments do not depend on each other, so threads with their own
segments meet only once.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.nn.axlstm_folded import FoldedAxLSTM
from hear_encoders.nn.axlstm_offline import OfflineEncoder
from hear_encoders.nn.build import Encoder

Result = TypeVar("Result")
Precision = Literal["auto", "float32", "bfloat16", "float16"]

# 2 s segments per forward pass, unless the caller chooses. On a CPU few are faster: they stay in the cache.
CPU_SEGMENTS, GPU_SEGMENTS = 8, 60

FOLDED_DTYPES = (torch.float32, torch.bfloat16)  # of an AxLSTM on a CPU

MMAP_THRESHOLD_BYTES = 31 * 2**20  # glibc raises its threshold for blocks of up to 32 MiB


class Execution:
    """How an `Embedder` runs its encoder.

    Args:
        precision, max_segments, compile: as for `Embedder`.
        layers: as for `PatchEncoder.encode`.
    """

    def __init__(
        self, precision: Precision, max_segments: int | None, compile: bool, layers: tuple[int, ...] | None = None
    ) -> None:
        self.precision, self.compile, self.layers = precision, compile, layers
        self._max_segments = max_segments
        self._compiled: tuple[Encoder, Callable[..., Tensor]] | None = None
        self._folded: FoldedAxLSTM | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None, "_folded": None}  # a copy compiles and folds for itself

    def max_segments(self, device: torch.device) -> int:
        """Return the most segments that are encoded at once on this device."""
        return self._max_segments or (CPU_SEGMENTS if device.type == "cpu" else GPU_SEGMENTS)

    def batches(self, indices: list[int], encoder: Encoder) -> Iterator[list[int]]:
        """Cut indices of equally long segments into batches of at most `max_segments`.

        All batches but the last are divisible by the number of threads that take segments of their own.
        """
        device = encoder.cls_token.device
        dtype = resolve_precision(self.precision, device)
        threads = self._threads(device) if dtype is torch.float32 or self._can_fold(encoder, dtype) else 1
        most = self.max_segments(device)
        even = len(indices) // threads * threads if most >= threads else 0
        size = most // threads * threads or most
        for first in range(0, even, size):
            yield indices[first : min(first + size, even)]
        for first in range(even, len(indices), most):
            yield indices[first : first + most]

    def encode(self, encoder: Encoder, frames: Tensor) -> Tensor:
        """Encode normalized log-mel segments: (B, F, bands) -> (B, N, D), or (B, N, layers * D).

        In the dtype the encoder gives, and with gradients if they are enabled and something requires them.
        """
        device = frames.device
        dtype = resolve_precision(self.precision, device)
        needs_grad = frames.requires_grad or any(parameter.requires_grad for parameter in encoder.parameters())
        train = torch.is_grad_enabled() and needs_grad
        folded = None if train else self._fold(encoder, dtype)
        autocast = folded is None and dtype is not torch.float32
        threads = 1 if train or autocast else self._threads(device)
        with torch.autocast(device.type, dtype=dtype, enabled=autocast):
            encode = folded or (self._compile(encoder) if self.compile else encoder)
            if self.layers is not None:
                encode = partial(encode, layers=self.layers)
            # A remainder that the threads cannot share evenly runs with intra-op parallelism.
            return encode_in_threads(encode, frames, threads if len(frames) % threads == 0 else 1)

    def is_slow(self, device: torch.device) -> bool:
        """Return whether the precision is half on an x86 CPU without AVX-512, which emulates it."""
        half = resolve_precision(self.precision, device) is not torch.float32
        x86 = platform.machine() in ("x86_64", "AMD64")
        return half and device.type == "cpu" and x86 and _cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")

    def _threads(self, device: torch.device) -> int:
        """Return the number of threads that may take segments of their own."""
        return torch.get_num_threads() if device.type == "cpu" and not self.compile else 1

    def _can_fold(self, encoder: Encoder, dtype: torch.dtype) -> bool:
        """Return whether `_fold` applies, unless the encoder's parameters rule it out."""
        on_cpu = encoder.cls_token.is_cpu and dtype in FOLDED_DTYPES
        return on_cpu and isinstance(encoder, AxLSTMEncoder) and encoder.mode == "auto"

    def _fold(self, encoder: Encoder, dtype: torch.dtype) -> OfflineEncoder | None:
        """Return an AxLSTM's folded form, which has no gradients; None if there is none for this encoder and dtype."""
        if not isinstance(encoder, AxLSTMEncoder) or not self._can_fold(encoder, dtype):
            return None
        if self._folded is None or not self._folded.is_current(encoder):
            self._folded = FoldedAxLSTM.of(encoder)
            if self._folded is not None and dtype is not torch.float32:
                self._folded = self._folded.to(dtype)
        return None if self._folded is None else OfflineEncoder(encoder, self._folded)

    def _compile(self, encoder: Encoder) -> Callable[..., Tensor]:
        """Compile the encoder once, for any number of full segments; each shorter length would compile again."""
        if self._compiled is None or self._compiled[0] is not encoder:
            self._compiled = encoder, torch.compile(encoder)
        compiled = self._compiled[1]

        def encode(frames: Tensor, layers: tuple[int, ...] | None = None) -> Tensor:
            if frames.shape[1] < encoder.config.patches.chunk_frames:
                return encoder(frames, layers)
            if frames.shape[0] > 1:  # torch compiles a batch of one separately
                torch._dynamo.maybe_mark_dynamic(frames, 0)
            return compiled(frames, layers)

        return encode


def available_devices() -> list[str]:
    """Return the names of this machine's devices that PyTorch can use: "cpu", then "cuda:0" and so on."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    numbers = range(torch.accelerator.device_count()) if kind is not None else ()
    return ["cpu", *(f"{kind.type}:{number}" for number in numbers if kind is not None)]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device that is there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps" and so on; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device. The message names those that are there.
    """
    names = available_devices()
    if device == "auto":
        return torch.device(names[1].partition(":")[0] if len(names) > 1 else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not one of PyTorch's: use 'auto' or {_listed(names)}") from error
    if wanted.type != "cpu" and f"{wanted.type}:{wanted.index or 0}" not in names:
        built = wanted.type != "cuda" or torch.version.cuda or torch.version.hip
        reason = "" if built else "; this PyTorch was built without CUDA"
        raise ValueError(f"device {str(wanted)!r} is not there, only {_listed(names)}{reason}")
    return wanted


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the encoder's matmuls for this choice on this device."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):  # the question is about the current device
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def raise_mmap_threshold() -> None:
    """Make glibc reuse freed memory, so that intermediate results do not come in fresh pages. No effect elsewhere.

    glibc returns a large block to the system when it is freed; the next tensor then gets fresh pages, which the system
    zeroes one by one. That costs a forward pass up to a third of its time on virtual machines. glibc raises the size
    it calls large to that of the largest block it has seen freed (mallopt(3), M_MMAP_THRESHOLD), so this allocates and
    frees one, untouched. From then on the process may keep up to 62 MB of freed memory.
    """
    torch.empty(MMAP_THRESHOLD_BYTES, dtype=torch.uint8, device="cpu")


def encode_in_threads(encode: Callable[[Tensor], Tensor], frames: Tensor, threads: int) -> Tensor:
    """Call `encode` on equal parts of a batch, each in its own thread.

    Args:
        encode: from (B, ...) to (B, ...), row by row. With more than one thread it runs in all of them at once,
            without gradients and without thread-local settings such as autocast or dispatch modes.
        frames: (B, ...); on the CPU if there is more than one thread.
        threads: 1 calls `encode` in this thread. So does any number if no threads can be started, for example
            while the interpreter shuts down.
    """
    if threads == 1:
        return encode(frames)
    inference = torch.is_inference_mode_enabled()

    def encode_part(part: Tensor) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            return encode(part)

    try:
        pool = _pool(threads, os.getpid())
        encoded = [pool.submit(encode_part, part) for part in frames.tensor_split(threads)]
    except RuntimeError:
        return encode(frames)
    return torch.cat([part.result() for part in encoded])


def call_on_one_core(function: Callable[[], Result]) -> Result:
    """Call a function in a thread in which torch uses one core, whatever is set for others, and return its result.

    Right for many small operations: more threads would mostly wait for each other. Each calling thread gets one such
    thread for itself, so that callers do not wait for each other. The function runs without the caller's thread-local
    settings, such as inference mode or autocast. In a thread that has one core already, it is called directly; so it
    is if no thread can be started, for example while the interpreter shuts down.
    """
    if torch.get_num_threads() == 1:
        return function()
    try:
        if getattr(_own, "process", None) != os.getpid():  # a forked process inherits no threads
            _own.pool, _own.process = _start_threads(1), os.getpid()
        called = _own.pool.submit(function)
    except RuntimeError:
        return function()
    return called.result()


_own = threading.local()
_pool_lock = threading.Lock()


@lru_cache(maxsize=8)  # a few numbers of threads may be in use at a time
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads for all callers in a process. A forked process needs its own: it inherits no threads."""
    return _start_threads(threads)


def _start_threads(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch uses one core each.

    `torch.set_num_threads` also changes the default for threads that start later. So a helper thread restores that
    default at once, and the caller's own setting is never touched.
    """
    all_started, all_set = (threading.Barrier(threads + 1) for _ in range(2))

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes over the default
        with suppress(threading.BrokenBarrierError):  # not all of the threads could be started
            all_started.wait()
            torch.set_num_threads(1)
            all_set.wait()

    def restore() -> None:
        default = torch.get_num_threads()
        with suppress(threading.BrokenBarrierError):
            all_started.wait()
            all_set.wait()
            torch.set_num_threads(default)

    with _pool_lock:
        restoring = threading.Thread(target=restore)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="hear_encoders", initializer=start)
        try:
            restoring.start()
            for _ in range(threads):
                pool.submit(int)  # starts a thread, since the others still wait
            restoring.join()
        except BaseException:
            all_started.abort()  # releases the threads that were started
            raise
    return pool


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
