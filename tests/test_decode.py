"""The decode kernels against attention in float64; on the CPU, through Triton's interpreter, which has no bfloat16."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton")
from hf_mla import attention_mla, decode_triton  # noqa: E402


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, where a row attends to nothing
ERRORS = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3}  # |out - reference| / |reference|
TYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
if not ON_GPU and not decode_triton.triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported before conftest.py could ask for its interpreter", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def reference(query, latent, rest, rank, scaling, mask=None, attended=None, num_key_norms=0, window=0, softcap=0.0, sinks=None):
    """`latent_decode`, from its docstring."""
    new_tokens, tokens, rope_dim = query.shape[2], latent.shape[1], query.shape[-1] - rank
    quantized = latent.dtype.itemsize == 1
    query, latent, rest = query.double(), latent.double(), rest.double()
    if quantized:
        latent = latent * rest[..., -1:]
    scores = torch.einsum("bhtw,bsw->bhts", query, torch.cat([latent, rest[..., :rope_dim]], dim=-1))
    if num_key_norms:
        norms = rest[..., rope_dim : rope_dim + num_key_norms].transpose(1, 2)
        scores = scores * norms.repeat_interleave(query.shape[1] // num_key_norms, dim=1).unsqueeze(2)
    scores = scores * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key, position = torch.arange(tokens, device=DEVICE), torch.arange(tokens - new_tokens, tokens, device=DEVICE).unsqueeze(1)
    if attended is not None:
        mask = ((key >= attended[:, :1]) & (key < attended[:, 1:2]))[:, None, None]
    elif mask is None:
        mask = (key <= position) & (key > position - (window or tokens))
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(len(query), -1, new_tokens, 1)], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0)[..., :tokens]
    return torch.einsum("bhts,bsr->hbtr", weights, latent)


def make_cache(batch, tokens, rank, rope_dim, norms, dtype, codes):
    """Latents and what is beside them, as views of a buffer with room to spare."""
    packed = torch.randn(batch, tokens + 70, rank + rope_dim + norms, device=DEVICE).to(dtype)
    packed[:, tokens:] = torch.nan
    latent, rest = packed[:, :tokens].tensor_split([rank], dim=-1)
    if codes is not None:
        wide = torch.randn(batch, tokens, rank, device=DEVICE) * 40
        latent = wide.clamp(-127, 127).to(codes)
        rest = torch.cat([rest, torch.rand(batch, tokens, 1, device=DEVICE).to(dtype) / 40], dim=-1)
    return latent, rest


def left_padding(batch, new_tokens, tokens):
    mask = torch.ones(batch, 1, new_tokens, tokens, dtype=torch.bool, device=DEVICE).tril(tokens - new_tokens)
    for row in range(batch):
        mask[row, :, :, : 13 * row] = False
    mask[..., tokens - 20 :] = False  # of a static cache, not written yet
    return mask


def tree(batch, new_tokens, tokens):
    mask = torch.rand(batch, 1, new_tokens, tokens, device=DEVICE) < 0.2
    mask[0, 0, 0] = False  # attends to nothing
    return mask


CASES = {  # batch, heads, new tokens, tokens, rank, rope_dim, and what is special
    "one split": (3, 4, 1, 90, 48, 16, {}),
    "many splits": (1, 32, 1, 1500, 96, 32, {}),
    "more sequences than processors": (9, 2, 1, 70, 32, 8, {}),
    "one head": (2, 1, 1, 300, 64, 16, {}),
    "several new tokens": (2, 4, 5, 300, 48, 16, {}),
    "odd dimensions": (2, 3, 2, 200, 33, 7, {}),
    "448 + 128": (1, 16, 1, 200, 448, 128, {}),
    "512 + 64": (2, 32, 1, 200, 512, 64, {}),
    "window": (2, 4, 3, 300, 48, 16, {"window": 50}),
    "soft cap": (2, 4, 1, 300, 48, 16, {"softcap": 3.0}),
    "key norms": (2, 8, 3, 200, 96, 32, {"num_key_norms": 4}),
    "left padding": (3, 4, 1, 300, 48, 16, {"mask": left_padding}),
    "left padding, several new tokens": (3, 4, 4, 300, 48, 16, {"mask": left_padding}),
    "tree": (2, 4, 6, 300, 64, 16, {"mask": tree}),
    "range": (3, 4, 1, 300, 48, 16, {"attended": [[5, 200, 0], [0, 300, 0], [40, 40, 0]]}),
    "int8": (2, 4, 1, 300, 64, 16, {"codes": torch.int8}),
    "fp8, key norms": (2, 4, 2, 300, 64, 16, {"codes": torch.float8_e4m3fn, "num_key_norms": 2}),
    "int8, 512 + 64": (2, 32, 1, 200, 512, 64, {"codes": torch.int8}),
    "one mask for all": (3, 4, 1, 300, 48, 16, {"mask": lambda *shape: left_padding(*shape)[1:2]}),
    "holes": (3, 4, 1, 300, 48, 16, {"mask": tree}),
    "sinks, one split": (9, 4, 1, 90, 48, 16, {"sinks": 1}),
    "sinks, many splits": (1, 32, 1, 1500, 96, 32, {"sinks": 1}),
    "sinks above all scores": (2, 4, 3, 300, 48, 16, {"sinks": 9}),
    "sinks, tree": (2, 4, 6, 300, 64, 16, {"mask": tree, "sinks": 1}),
    "sinks, range": (3, 4, 1, 300, 48, 16, {"attended": [[5, 200, 0], [0, 300, 0], [40, 40, 0]], "sinks": 1}),
    "sinks, int8": (2, 4, 1, 300, 64, 16, {"codes": torch.int8, "mask": left_padding, "sinks": 1}),
    "sinks, fp8, soft cap": (2, 4, 2, 300, 64, 16, {"codes": torch.float8_e4m3fn, "softcap": 3.0, "sinks": 1}),
}
GPU_CASES = {
    "64 rows": (3, 128, 1, 3000, 512, 64, {}),
    "16 heads": (3, 16, 1, 3000, 512, 64, {}),
    "long": (1, 32, 1, 40000, 512, 64, {"mask": left_padding}),
    "8k, int8": (2, 32, 1, 8192, 512, 64, {"codes": torch.int8}),
    "128k": (1, 32, 1, 131072, 512, 64, {}),
    "128k, int8": (1, 32, 1, 131072, 512, 64, {"codes": torch.int8}),
    "128k, int8, 16 heads, key norms": (1, 16, 1, 131072, 128, 32, {"codes": torch.int8, "num_key_norms": 8, "mask": left_padding}),
    "short prefill": (2, 32, 48, 2000, 512, 64, {"mask": left_padding}),
    "256 + 64": (5, 32, 1, 2000, 256, 64, {}),
    "448 + 128, 64 rows": (2, 64, 1, 2000, 448, 128, {}),
    "int8, 64 rows": (3, 64, 1, 3000, 512, 64, {"codes": torch.int8, "mask": left_padding}),
    "fp8, 16 heads": (3, 16, 1, 3000, 512, 64, {"codes": torch.float8_e4m3fn, "num_key_norms": 8}),
    "int8, 96 + 32": (40, 32, 1, 500, 96, 32, {"codes": torch.int8}),
    "70,000 sequences": (70000, 2, 1, 40, 32, 8, {}),
    "128 + 32": (40, 32, 1, 2000, 128, 32, {"num_key_norms": 8}),
    "sinks, 64 rows": (3, 128, 1, 3000, 512, 64, {"mask": left_padding, "sinks": 1}),
    "sinks, one split, 512 + 64": (300, 16, 1, 200, 512, 64, {"sinks": 1}),
    "sinks, int8, 512 + 64": (3, 64, 1, 3000, 512, 64, {"codes": torch.int8, "sinks": 1}),
    "two groups": (5, 64, 1, 3000, 512, 64, {}),
    "two groups, one split": (300, 64, 1, 330, 512, 64, {}),
    "two groups, many splits": (1, 128, 1, 40001, 512, 64, {"mask": left_padding}),
    "two groups, odd tiles": (3, 128, 1, 12700, 512, 64, {}),
    "two groups, less than a tile": (2, 128, 1, 40, 512, 64, {}),
    "two groups, less than two tiles": (2, 64, 1, 65, 512, 64, {"mask": left_padding}),
    "two groups, two new tokens": (2, 64, 2, 3000, 512, 64, {}),
    "two groups, two new tokens, left padding": (3, 64, 2, 3000, 512, 64, {"mask": left_padding}),
    "two groups, window": (2, 64, 3, 700, 512, 64, {"window": 50}),
    "two groups, range": (3, 128, 1, 700, 512, 64, {"attended": [[5, 600, 0], [0, 7, 0], [40, 40, 0]]}),
    "two groups, tree, sinks, soft cap": (2, 64, 6, 700, 512, 64, {"mask": tree, "sinks": 5, "softcap": 3.0}),
    "two groups, tree": (2, 64, 6, 700, 512, 64, {"mask": tree}),
    "two groups, sinks, one split": (300, 64, 1, 330, 512, 64, {"sinks": 5}),
    "two groups, key norms": (2, 128, 2, 3000, 512, 64, {"num_key_norms": 8, "mask": left_padding}),
    "two groups, 40 heads, 320 + 32": (3, 40, 1, 3000, 320, 32, {"num_key_norms": 8}),
}


# In the interpreter, errors of float32 show every mistake but those of numbers that are turned into others.
HALF = ["many splits", "odd dimensions", "512 + 64", "fp8, key norms", "int8, 512 + 64", "sinks, tree", "sinks, int8"]
CHOSEN = [(case, dtype) for case in (CASES | GPU_CASES if ON_GPU else CASES) for dtype in TYPES[: 1 + (ON_GPU or case in HALF)]]


@pytest.mark.parametrize("case, dtype", CHOSEN, ids=str)
def test_against_float64(case, dtype):
    batch, heads, new_tokens, tokens, rank, rope_dim, options = (CASES | GPU_CASES)[case]
    options = dict(options)
    torch.manual_seed(0)
    query = torch.randn(batch, heads, new_tokens, rank + rope_dim, device=DEVICE).to(dtype)
    norms = options.get("num_key_norms", 0)
    latent, rest = make_cache(batch, tokens, rank, rope_dim, norms, dtype, options.pop("codes", None))
    if "mask" in options:
        options["mask"] = options["mask"](batch, new_tokens, tokens)
    if "attended" in options:
        options["attended"] = torch.tensor(options["attended"], dtype=torch.int32, device=DEVICE)
    if "sinks" in options:
        options["sinks"] = torch.randn(heads, device=DEVICE) + options["sinks"]
    scaling = 3 / (rank + rope_dim) ** 0.5
    out = decode_triton.latent_decode(query, latent, rest, rank, scaling, **options)
    expected = reference(query, latent, rest, rank, scaling, **options)
    assert out.shape == (heads, batch, new_tokens, rank) and out.is_contiguous() and out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[dtype]


@pytest.mark.parametrize("make", [left_padding, tree])
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_attended_range(make, new_tokens):
    mask = make(3, new_tokens, 300)
    ranges = decode_triton.attended_range(mask)
    for row, (start, stop, holes) in zip(mask[:, 0], ranges.tolist(), strict=True):
        attended = row.any(0).nonzero().flatten().tolist() or [0]
        if row.any():
            assert (start, stop) == (attended[0], attended[-1] + 1)
        else:
            assert start == stop
        assert holes == (not row[:, start:stop].all())


@pytest.mark.parametrize("heads, rank, rope_dim", [(4, 64, 16), (64, 512, 64)])
def test_sequences_may_share_their_latents(heads, rank, rope_dim):
    """One row of tokens, and for each request a part of it."""
    torch.manual_seed(0)
    latent, rest = make_cache(1, 300, rank, rope_dim, 0, TYPES[1], None)
    latent, rest = latent.expand(3, -1, -1), rest.expand(3, -1, -1)
    query = torch.randn(3, heads, 1, rank + rope_dim, device=DEVICE).to(TYPES[1])
    attended = torch.tensor([[0, 100, 0], [100, 101, 0], [101, 300, 0]], dtype=torch.int32, device=DEVICE)
    out = decode_triton.latent_decode(query, latent, rest, rank, 0.1, attended=attended)
    expected = reference(query, latent, rest, rank, 0.1, attended=attended)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[TYPES[1]]


class Seen:
    """In the place of a kernel, which it runs if it has one: what that was given."""

    def __init__(self, kernel=None):
        self.kernel, self.given = kernel, {}

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.given = kwargs
            if self.kernel is not None:
                self.kernel[grid](*args, **kwargs)

        return run


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("layout", ["packed", "apart", "apart, growing"])
def test_nothing_is_copied(layout, codes, monkeypatch):
    """Latents and what is beside them are read where they lie: in one tensor or two, in a static cache or one with room to grow."""
    torch.manual_seed(0)
    batch, tokens, rank, rope_dim, dtype = 2, 90, 64, 16, TYPES[1]
    if layout == "packed":
        latent, rest = make_cache(batch, tokens, rank, rope_dim, 0, dtype, codes)
    else:
        room = tokens + 38 * (layout == "apart, growing")
        shapes = (batch, 1, room, rank), (batch, 1, room, rope_dim + (codes is not None))
        latent, rest = (torch.randn(shape, device=DEVICE) for shape in shapes)
        latent, rest = latent.mul(40).clamp(-127, 127).to(codes) if codes else latent.to(dtype), rest.abs().to(dtype)
        latent, rest = latent[:, :, :tokens][:, 0], rest[:, :, :tokens][:, 0]
    query, sinks = torch.randn(batch, 4, 1, rank + rope_dim, device=DEVICE).to(dtype), torch.randn(4, device=DEVICE)
    mask = left_padding(batch, 1, tokens)
    seen = Seen(decode_triton.split_kernel)
    monkeypatch.setattr(decode_triton, "split_kernel", seen)
    monkeypatch.setattr(decode_triton, "decode_hopper", None)
    scaling = 0.01 if codes else 0.3
    out = decode_triton.latent_decode(query, latent, rest, rank, scaling, mask, sinks=sinks)
    expected = reference(query, latent, rest, rank, scaling, mask, sinks=sinks)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[dtype]
    for name, tensor in {"query": query, "latent": latent, "rest": rest, "mask": mask, "sinks": sinks}.items():
        assert seen.given[name].data_ptr() == tensor.data_ptr(), name
    assert [seen.given[name] for name in ("latent_b", "latent_s", "rest_b", "rest_s")] == [
        *latent.stride()[:2],
        *rest.stride()[:2],
    ]


@pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "rank, rope_dim, apart, codes, taken",
    [
        (512, 64, True, None, True),
        (512, 64, False, None, True),
        (64, 8, True, None, True),
        (64, 12, True, None, False),  # a row of rotary keys is no multiple of 16 bytes
        (60, 8, True, None, False),
        (512, 64, True, torch.int8, True),  # what is beside codes does not come by the copy engine
        (64, 12, True, torch.float8_e4m3fn, True),
        (72, 8, True, torch.int8, False),
    ],
    ids=str,
)
def test_when_the_hopper_kernel_runs(rank, rope_dim, apart, codes, taken):
    """Latents and rotary keys in two tensors are read as they lie, where rows begin at multiples of 16 bytes."""
    latent, rest = make_cache(2, 90, rank, rope_dim, 0, torch.bfloat16, codes)
    if apart:
        latent, rest = latent.contiguous(), rest.contiguous()
    query = torch.randn(2, 4, 1, rank + rope_dim, device=DEVICE).to(torch.bfloat16)
    assert decode_triton.decode_hopper.fits(query, latent, rest) == taken
    out = decode_triton.latent_decode(query, latent, rest, rank, 0.1)
    expected = reference(query, latent, rest, rank, 0.1)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[torch.bfloat16]


@pytest.mark.parametrize(
    "heads, new_tokens, rank, rope_dim, codes, taken",
    [
        (64, 1, 512, 64, None, "two_groups_kernel"),
        (33, 1, 512, 64, None, "two_groups_kernel"),
        (32, 2, 320, 32, None, "two_groups_kernel"),
        (32, 1, 512, 64, None, "hopper_kernel"),
        (128, 1, 512, 64, torch.int8, "hopper_kernel"),
        (128, 1, 256, 64, None, "hopper_kernel"),  # of which two programs fit a multiprocessor
        (128, 1, 448, 128, None, "hopper_kernel"),  # of which 64 rows do not fit
    ],
    ids=str,
)
def test_which_hopper_kernel_runs(heads, new_tokens, rank, rope_dim, codes, taken, monkeypatch):
    """Two groups are for 64 rows of wide latents."""
    hopper = pytest.importorskip("hf_mla.decode_hopper")
    kernels = {name: Seen() for name in ("hopper_kernel", "two_groups_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(hopper, name, kernel)
    monkeypatch.setattr(hopper, "fits", lambda *_: True)
    latent, rest = make_cache(2, 90, rank, rope_dim, 0, TYPES[1], codes)
    query = torch.randn(2, heads, new_tokens, rank + rope_dim, device=DEVICE).to(TYPES[1])
    decode_triton.latent_decode(query, latent.contiguous(), rest.contiguous(), rank, 0.1)
    assert [name for name, kernel in kernels.items() if kernel.given] == [taken]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from hf_mla.decode_hopper import BLOCK_N, hopper_kernel, two_groups_kernel

def size(rank, rope, rows, warps, type, kernel=hopper_kernel, **changes):
    constants = dict(R=rank, P=rope, BLOCK_M=rows, NORMS=0, MASKED=False, BOUNDED=False, CAPPED=False)
    if kernel is hopper_kernel:
        constants |= dict(warps=warps, QUANTIZED=False)
    constants |= dict(BLOCK_P=max(16, triton.next_power_of_2(rope))) | changes
    kinds = dict(query="*" + type, rest="*" + type, out="*fp32", lse="*fp32", attended="*i32", mask="*u8", scale="fp32", cap="fp32")
    kinds["sinks"] = "*fp32"
    codes = constants.pop("codes", None)
    halves = 2 if kernel is two_groups_kernel else 1
    wide = {"latents": max(64, triton.next_power_of_2(rank)) // halves, "ropes": constants["BLOCK_P"]}
    if not constants.pop("sunk", False):
        constants["sinks"] = None
    if codes:
        constants |= dict(ropes=None, QUANTIZED=True)
    for name in wide.keys() - constants.keys():
        block = [1, BLOCK_N, wide[name]]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.int8 if codes else gl.bfloat16)
        kinds[name] = f"tensordesc<{codes or type}{block},{layout!r}>"
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert "wgmma" in compiled.asm["ptx"] and "cp.async.bulk" in compiled.asm["ptx"]
    return compiled.metadata.shared

print(size(512, 64, 32, 4, "bf16"))
print(size(256, 64, 64, 8, "bf16", MASKED=True, BOUNDED=True, NORMS=8))
print(size(448, 128, 32, 4, "fp16", CAPPED=True))
print(size(48, 16, 16, 4, "bf16", BOUNDED=True))
print(size(512, 64, 32, 8, "bf16", codes="i8"))
print(size(512, 64, 64, 8, "bf16", codes="i8", MASKED=True, BOUNDED=True, sunk=True))
print(size(512, 64, 64, 4, "bf16", kernel=two_groups_kernel, MASKED=True, BOUNDED=True))
print(size(320, 32, 64, 4, "fp16", kernel=two_groups_kernel, NORMS=8, CAPPED=True, sunk=True))
"""


def test_the_hopper_kernels_compile():
    """Where there is no such GPU, the compiler can still tell; a program has 227 KiB of shared memory there."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(size) <= 227 * 1024 for size in done.stdout.split())


def test_a_triton_that_cannot_compile_gluon_gets_the_other_kernel(monkeypatch):
    def launch(*args, **kwargs):
        raise decode_triton.triton.CompilationError("source", None, "an unknown name")

    monkeypatch.setattr(decode_triton, "decode_hopper", SimpleNamespace(fits=lambda *_: True, launch=launch))
    torch.manual_seed(0)
    query, (latent, rest) = torch.randn(2, 4, 1, 64, device=DEVICE).to(TYPES[1]), make_cache(2, 90, 48, 16, 0, TYPES[1], None)
    expected = reference(query, latent, rest, 48, 0.3)
    with pytest.warns(UserWarning, match="a slower one is used"):
        out = decode_triton.latent_decode(query, latent, rest, 48, 0.3)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[TYPES[1]]
    assert decode_triton.decode_hopper is None


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_many_small_weights_of_small_latents_count(codes):
    """In 16 bits their product alone would be too small: one token outweighs each other one, and not all of them together."""
    torch.manual_seed(0)
    latent, rest = make_cache(1, 1500, 64, 16, 0, torch.float16, codes)
    rest[..., :16], rest[..., 16] = 0, 4e-4
    rest[:, 0, :16] = 1
    latent[:, 1:] = latent[:, 1:].float().abs().to(codes)  # or they would cancel
    query = torch.zeros(1, 4, 1, 80, device=DEVICE, dtype=torch.float16)
    query[..., 64:] = 10 / 16  # its score is 10, those of all others 0
    expected = reference(query, latent, rest, 64, 1.0)
    out = decode_triton.latent_decode(query, latent, rest, 64, 1.0)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[torch.float16]


@pytest.mark.parametrize("splits", [3, 300])
def test_any_number_of_splits_is_merged(splits, monkeypatch):
    """More than a program takes at once, too; splits without tokens weigh nothing."""
    monkeypatch.setattr(decode_triton, "choose_splits", lambda *_: splits)
    torch.manual_seed(0)
    query, (latent, rest) = torch.randn(1, 2, 1, 64, device=DEVICE).to(TYPES[0]), make_cache(1, 700, 48, 16, 0, TYPES[0], None)
    out, expected = decode_triton.latent_decode(query, latent, rest, 48, 0.3), reference(query, latent, rest, 48, 0.3)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[TYPES[0]]


@pytest.mark.parametrize("programs, blocks", [(1, 1024), (16, 64), (64, 64), (100, 32), (128, 32), (5, 1)])
def test_splits_fill_the_processors(programs, blocks):
    """In the rounds that the programs take, three in four places are filled, unless parts would become too small."""
    splits = decode_triton.choose_splits(programs, blocks, 132)
    rounds = -(-programs * splits // 132)
    assert programs * splits / (132 * rounds) > 0.75 or splits == blocks


@pytest.mark.parametrize(
    "changes, runs",
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"mask": torch.zeros(1, 1, 1, 9)}, False),
        ({"mask": torch.zeros(1, 1, 1, 9), "packed": True}, True),
        ({"mask": torch.ones(1, 9)}, True),
        ({"rank": 513}, False),
        ({"rope_dim": 0}, False),
        ({"capability": (7, 5)}, False),
        ({"exporting": True}, False),
        ({"exporting": True, "compiling": True}, True),  # so it is with torch 2.11
    ],
    ids=str,
)
def test_when_the_kernel_runs(changes, runs, monkeypatch):
    changes = {"mask": torch.ones(1, 1, 1, 9, dtype=torch.bool), "dtype": torch.bfloat16, "is_cuda": True} | changes
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: changes.get("capability", (9, 0)))
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: "exporting" in changes)
    monkeypatch.setattr("torch.compiler.is_dynamo_compiling", lambda: "compiling" in changes)
    query = SimpleNamespace(is_cuda=changes["is_cuda"], dtype=changes["dtype"], device=SimpleNamespace(index=0))
    latent, packed = SimpleNamespace(dtype=changes["dtype"]), changes.get("packed", False)
    dims = changes.get("rank", 512), changes.get("rope_dim", 64)
    assert attention_mla.runs_in_kernel(query, latent, changes["mask"], *dims, packed) is runs


@pytest.mark.parametrize("norms, quantization", [(0, None), (2, None), (0, "int8"), (0, "apart")])
def test_absorbed_attention_takes_the_kernel(norms, quantization):
    """With the kernel, absorbed attention gives what it gives without it."""
    from hf_mla.cache_mla import QUANTIZATIONS, quantize

    torch.manual_seed(0)
    dtype = TYPES[0]
    shapes = (2, 4, 3, 12), (2, 4, 3, 16), (2, 1, 60, 64 + 16 + norms), (4 * 20, 64)
    q_nope, q_rope, latent, weight = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    rest = None
    if quantization == "apart":  # as the library's own models hold latents and rotary keys
        latent, rest = latent.split([64, 16], dim=-1)
    elif quantization:
        latent, rest = quantize(latent, 64, QUANTIZATIONS[quantization])
    mask = tree(2, 3, 60) | (torch.arange(60, device=DEVICE) == 5)
    outputs = []
    for kernel in (False, True):
        output, weights = attention_mla.absorbed_attention(q_nope, q_rope, latent, weight, mask, 0.1, norms, rest, kernel)
        assert (weights is None) == kernel
        outputs.append(output.double())
    assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 2 * ERRORS[dtype]
