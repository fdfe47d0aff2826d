"""`bench`: what it times, what it measures of the caches, its picture, and one line for whatever is wrong."""

import json
import runpy
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MODEL, make_llama, make_source
from test_native import config_and_class
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from hf_mla import LatentDynamicLayer, absorb, cache_bytes, cache_of
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion import bench, convert
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands import bench as bencher
from hf_mla_conversion.output.plotting import draw_bench


KEYS = {"decode_tokens_per_second", "cache_bytes", "batch", "context", "device", "dtype"}
QUICK = {"against": MODEL, "device": "cpu", "new_tokens": 1}
LEAST = bencher.WARM_UP_STEPS + bencher.REPEATS + 2  # the shortest context at one new token


@pytest.fixture
def out(closed_form):
    return closed_form


def make_native(folder, name):
    """Save a tiny random MLA model of the library."""
    config, model_class = config_and_class(name)
    model_class._from_config(config).save_pretrained(folder)
    return str(folder)


def run(capsys, *words):
    """Exit code, standard output, and the program's own lines on standard error."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("hf-mla:")]


def test_report(capsys, tmp_path, out):
    words = ["bench", out, "--against", MODEL, "--batch", 3, "--context", 96, 32, 96, "--new-tokens", 2, "--device", "cpu"]
    code, text, errors = run(capsys, *words, "--json", "--plot", tmp_path / "speed.png")
    result = json.loads(text)
    assert (code, errors) == (0, [])
    assert set(result) >= KEYS
    assert [context["context"] for context in result["contexts"]] == [32, 96]
    assert {name: result[name] for name in result["contexts"][1]} == result["contexts"][1]
    assert (result["batch"], result["new_tokens"], result["dtype"]) == (3, 2, "float32")
    assert result["device"].startswith("CPU")
    for context in result["contexts"]:
        numbers = 6 * 3 * context["context"]  # layers, sequences, tokens
        assert context["cache_bytes"] == {"source": 192 * 4 * numbers, "converted": 60 * 4 * numbers}
        assert context["cache_ratio"] == 0.3125
        rates, times = context["decode_tokens_per_second"], context["decode_ms_per_token"]
        for side in ("source", "converted"):
            assert times[side] > 0 and rates[side] == pytest.approx(3000 / times[side])
            assert 0 <= context["spread"][side] < 100
        assert context["speedup"] == pytest.approx(rates["converted"] / rates["source"])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

    pages = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "pages.py"))
    assert pages["bench"](result).splitlines()[-1].endswith(f"| x {result['speedup']:.2f} | x 0.312 |")


def test_table(capsys, out):
    code, text, errors = run(capsys, "bench", out, "--against", MODEL, "--context", 32, LEAST, "--new-tokens", 1, "--device", "cpu")
    lines = text.splitlines()
    assert (code, errors) == (0, [])
    assert lines[0].endswith("float32, batch 1, static cache")
    assert lines[1].split() == ["context", "model", "ms", "a", "step", "spread", "tokens", "a", "second", "ratio", "cache", "ratio"]
    assert [line.split()[:2] for line in lines[2::2]] == [[str(LEAST), "source"], ["32", "source"]]
    assert all(line.split()[0] == "converted" and line.endswith("x 0.312") for line in lines[3::2])


def test_native_model(capsys, monkeypatch, tmp_path):
    """It is loaded once, and compared with itself."""
    load, decode, attention = bencher.load_model, bencher.decode, []

    def loaded(*arguments):
        attention.append("loaded")
        return load(*arguments)

    def decoded(model, *arguments):
        attention.append(model.config._attn_implementation)
        return decode(model, *arguments)

    monkeypatch.setattr(bencher, "load_model", loaded)
    monkeypatch.setattr(bencher, "decode", decoded)
    folder = make_native(tmp_path, "deepseek_v3")
    words = ["bench", folder, "--context", LEAST, 40, "--new-tokens", 1, "--batch", 2, "--device", "cpu"]
    code, text, errors = run(capsys, *words, "--json")
    result = json.loads(text)
    assert (code, errors, attention) == (0, [], ["loaded", "sdpa", "sdpa", "hf_mla", "hf_mla"])
    assert set(result) >= KEYS
    assert (result["names"], result["cache"]) == ({"source": "sdpa", "converted": "hf_mla"}, "static")
    held = 3 * 2 * 40 * (24 + 8) * 4  # layers, sequences, tokens, numbers of a latent, bytes
    assert result["cache_bytes"] == {"source": held, "converted": held}
    code, text, errors = run(capsys, *words[:3], *words[4:], "--cache", "dynamic")
    lines = text.splitlines()
    assert (code, errors) == (0, [])
    assert lines[0].endswith("float32, batch 2, dynamic cache")
    assert (lines[2].split()[:2], lines[3].split()[:1]) == (["40", "sdpa"], ["hf_mla"])


def test_dtype_and_default_context(out):
    report = bench(out, **QUICK, dtype="bfloat16")
    assert (report.dtype, report.context) == ("bfloat16", 1024)  # the model has no more positions
    assert report.cache_bytes.converted == 60 * 2 * 6 * 1024


def check_filled_cache(model, kind):
    """`generate` goes on from the filled cache as it does from the prompt itself, and the cache ends full."""
    prompt = torch.randint(3, 97, (1, 20))
    options = {"max_new_tokens": 11, "min_new_tokens": 11, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(prompt, **options, cache_implementation="static" if kind == "static" else None)
    with torch.no_grad():
        cache = bencher.filled_cache(model, prompt[:, :-1], 3, 30, kind)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in cache_of(expected).layers]
    result = model.generate(prompt.expand(3, -1), **options, **{CACHE_NAME: cache})
    assert torch.equal(result.sequences, expected.sequences.expand(3, -1))
    assert cache.get_seq_length() == 30
    assert cache_bytes(cache) == 3 * cache_bytes(cache_of(expected))
    return cache


@pytest.mark.parametrize("kind", bencher.CACHES)
@pytest.mark.parametrize("changes", [{}, {"family": "Mistral", "sliding_window": 12}], ids=["full", "sliding window"])
@pytest.mark.parametrize("converted", [False, True])
def test_a_copied_prompt_is_a_read_prompt(tmp_path, changes, converted, kind):
    folder = make_source(tmp_path / "source", **changes)
    if converted:
        convert(folder, str(tmp_path / "out"), kv_lora_rank=24, qk_rope_head_dim=8, calibration_tokens=512, steps=0, device="cpu")
        folder = tmp_path / "out"
    cache = check_filled_cache(AutoModelForCausalLM.from_pretrained(folder).eval(), kind)
    if kind == "dynamic" and not changes:
        assert type(cache.layers[0]) is (LatentDynamicLayer if converted else DynamicLayer)


@pytest.mark.parametrize("kind", bencher.CACHES)
@pytest.mark.parametrize("absorbed", [False, True], ids=["sdpa", "hf_mla"])
@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_linear"])
def test_a_copied_prompt_of_a_native_model(tmp_path, name, absorbed, kind):
    """One that caches two tensors a layer, and one with layers of linear attention, whose states cannot be copied so."""
    model = AutoModelForCausalLM.from_pretrained(make_native(tmp_path, name)).eval()
    if absorbed:
        absorb(model)
    check_filled_cache(model, kind)


def test_only_steps_are_timed(monkeypatch):
    """Prompt and warm-up take a thousand seconds a pass, steps one: that is what is measured."""
    now = [0.0]
    lengths = []

    def forward(_module, _inputs, options, _output):
        lengths.append(options["input_ids"].shape[1])
        now[0] += 1000 if len(lengths) <= 2 + bencher.WARM_UP_STEPS else 1  # two passes read the prompt

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.register_forward_hook(forward, with_kwargs=True)
    monkeypatch.setattr("hf_mla_conversion.commands.bench.time.perf_counter", lambda: now[0])
    steps = bencher.decoded_steps(3)
    assert bencher.decode(model, 2, 64, 3, "static").milliseconds == [1000] * bencher.REPEATS
    assert lengths == [63 - steps, 1] + [1] * steps


def test_one_model_at_a_time(monkeypatch, out):
    load, models, alive = bencher.load_model, [], []

    def watched(*arguments):
        alive.append([model() is not None for model in models])
        model = load(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(bencher, "load_model", watched)
    bench(out, **QUICK, context=LEAST)
    assert alive == [[], [False]]


def test_picture(out):
    report = bench(out, **QUICK, context=[LEAST, 40])
    left, right = draw_bench(report).axes
    for axes, name, unit in ((left, "decode_tokens_per_second", 1), (right, "cache_bytes", 1e6)):
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        assert drawn == {
            side: ([LEAST, 40], [getattr(getattr(context, name), side) / unit for context in report.contexts])
            for side in ("source", "converted")
        }


WRONG = {
    "batch": (["--batch", 0], "--batch is 0; it must be at least 1"),
    "new tokens": (["--new-tokens", -1], "--new-tokens is -1; it must be at least 1"),
    "no context": (["--context", 0], "--context is 0; --new-tokens 32 takes 170: give more, or lower --new-tokens"),
    "short context": (["--context", 169, 512], "--context is 169; --new-tokens 32 takes 170"),
    "long context": (["--context", 512, 1025], "--context is 1025; the model has positions for 1024"),
    "many new tokens": (["--new-tokens", 500], "--context is 1024; --new-tokens 500 takes 2510"),
    "device": (["--device", "tpu"], "--device tpu is not available; use auto, cpu, cuda or cuda:N"),
    "cache": (["--cache", "quantized"], "--cache is quantized; it must be one of static, dynamic"),
    "dtype": (["--dtype", "int8"], "--dtype is int8; it must be one of auto, float32, bfloat16, float16"),
    "picture": (["--plot", "a.bmp"], "--plot a.bmp: the name must end in one of"),
    "folder of the picture": (["--plot", "/no/such/a.png"], "--plot /no/such/a.png cannot be written"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(capsys, monkeypatch, out, words, message):
    monkeypatch.setattr(bencher, "load_model", None)  # all of this is said before anything is loaded
    code, text, errors = run(capsys, "bench", out, "--against", MODEL, *words)
    assert (code, text, len(errors)) == (2, "", 1)
    assert message in errors[0]


def test_wrong_checkpoints(capsys, tmp_path, out):
    other = make_llama(tmp_path / "other")
    for words, message in (
        ([MODEL, "--against", MODEL], "not a converted model; convert it first"),
        ([out, "--against", other], "it was converted from another model"),
        ([out, "--against", out], "already has latent attention"),
        ([tmp_path / "none", "--against", MODEL], "there is no folder"),
        ([out], "is a converted model; give --against, what it was converted from"),
        ([other], f"{other} is a 'llama', which has no MLA; give a model that has it, or a converted one and --against"),
    ):
        code, text, errors = run(capsys, "bench", *words)
        assert (code, text, len(errors)) == (2, "", 1)
        assert message in errors[0]


def test_without_matplotlib(capsys, monkeypatch, out):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, text, errors = run(capsys, "bench", out, "--against", MODEL, "--plot", "a.png")
    assert (code, text) == (2, "") and 'pip install "hf-mla[plot]"' in errors[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), None], ids=["GPU", "CPU"])
def test_too_little_memory(capsys, monkeypatch, out, error):
    def cache(*_arguments):
        if error is None:
            return torch.empty(1 << 60)  # as on a CPU
        raise error

    words = ["bench", out, "--against", MODEL, "--device", "cpu"]
    monkeypatch.setattr(bencher, "filled_cache", cache)
    code, text, errors = run(capsys, *words, "--batch", 7, "--context", 512)
    assert (code, text, len(errors)) == (2, "", 1)
    assert f"{MODEL} at --batch 7 and --context 512: this does not fit in the memory of CPU" in errors[0]
    assert errors[0].endswith("lower one of them")
    monkeypatch.setattr(bencher, "load_model", cache)
    code, text, errors = run(capsys, *words)
    assert (code, text, len(errors)) == (2, "", 1)
    assert f"the weights of {MODEL}: this does not fit" in errors[0]


def test_other_errors_are_not_taken_for_it(monkeypatch, out):
    def broken(*_arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(bencher, "filled_cache", broken)
    with pytest.raises(RuntimeError, match="something else"):
        bench(out, **QUICK)


def test_interrupted(capsys, monkeypatch, out):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bencher, "decode", interrupt)
    words = ["bench", out, "--against", MODEL, "--batch", 2]
    code, text, errors = run(capsys, *words)
    assert (code, text) == (130, "")
    assert errors == [f"hf-mla: interrupted; to start again: hf-mla {' '.join(map(str, words))}"]
