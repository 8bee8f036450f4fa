"""Two repairs of Triton 3.7's interpreter, applied before the first interpreted launch of a test run.

Rounding: GPUs round float32 to the nearest bfloat16, ties to even. The interpreter cuts the low bits off, which doubles the
error. Speed: it replaces the whole language by interpreted functions at every call of a device function, which takes half of
its time. Once for each launch is enough.
"""

import numpy as np
from triton.language import bfloat16, core, float32
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, InterpreterError, TensorHandle


def repair_interpreter() -> None:
    _round_to_nearest()
    _patch_language_once()


def _round_to_nearest() -> None:
    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: InterpreterBuilder, src: TensorHandle, dst_type: object) -> TensorHandle:
        if (src.dtype.scalar, dst_type.scalar) != (float32, bfloat16):
            return truncate(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, nearest_even).astype(np.uint16), bfloat16)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def _patch_language_once() -> None:
    launch = GridExecutor.__call__
    patched: set[bool] = set()  # for which of the language's two modules it was done in this launch: triton.language, its core

    def start(self: GridExecutor, *args: object, **kwargs: object) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        of_core = any(value is core for value in self.fn.__globals__.values())
        if of_core not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(of_core)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    GridExecutor.__call__ = start
    InterpretedFunction.__call__ = call
