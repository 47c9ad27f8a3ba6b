"""The same from Python, with nothing but the standard library: ctypes knows no header, so the structs stand here."""

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_size_t, c_uint32, c_uint64, c_void_p


class Tensor(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("dtype", c_uint32), ("dims", POINTER(c_size_t)), ("rank", c_size_t)]


class Bytes(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("len", c_size_t)]


class Metrics(ctypes.Structure):
    _fields_ = [("step", c_uint64), ("epoch", c_uint64), ("loss", c_double), ("lr", c_double), ("grad_norm", c_double),
                ("step_time", c_double), ("samples_per_second", c_double), ("memory_gb", c_double)]


library, recipe = ctypes.CDLL(sys.argv[1]), open(sys.argv[2], "rb").read()
library.flowtape_last_error.restype = c_char_p
ABI_VERSION, WEIGHTS = 1, 1


def call(name, *args):
    if getattr(library, "flowtape_" + name)(*args) != 0:
        raise RuntimeError(library.flowtape_last_error().decode())


def tensor(name, values, *dims):
    return Tensor(name, ctypes.cast((c_float * len(values))(*values), c_void_p), 0, (c_size_t * len(dims))(*dims), len(dims))


assert library.flowtape_abi_version() == ABI_VERSION
trainer = c_void_p()
call("trainer_without_data", ABI_VERSION, recipe, byref(trainer))
batch = (Tensor * 3)(tensor(b"latents", [0.5] * 256, 4, 1, 8, 8), tensor(b"text_embeddings", [0.1] * 384, 4, 3, 32),
                     tensor(b"pooled_prompt_embeds", [0.1] * 128, 4, 32))
losses, metrics = [], Metrics()
for _ in range(30):
    call("trainer_step_on", trainer, batch, c_size_t(3), byref(metrics))
    losses.append(metrics.loss)
assert metrics.step == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
out = (c_float * 256)()
call("trainer_set_sampling", trainer, c_size_t(2), c_double(1.0))
call("trainer_sample", trainer, batch, c_size_t(3), None, c_size_t(0), c_uint64(1), out, c_size_t(256))
kept = Bytes()
call("trainer_save_to_memory", trainer, WEIGHTS, byref(kept))
header = ctypes.string_at(kept.data, kept.len)
assert b"transformer_blocks.0" in header[:4096], header[:100]
call("trainer_load_from_memory", trainer, WEIGHTS, c_void_p(kept.data), c_size_t(kept.len))
library.flowtape_bytes_free(kept)
try:
    call("trainer_step_on", None, batch, c_size_t(3), None)
    sys.exit("a null trainer was taken")
except RuntimeError as error:
    assert "got null" in str(error), error
library.flowtape_trainer_free(trainer)
print("done")
