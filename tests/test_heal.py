"""Healing: what is trained, what is written, what survives, and what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, MODEL, VALIDATION, make_source, run_apart
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_mla_conversion import UserError, convert, heal
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands import heal as healer
from hf_mla_conversion.mathematics import distill as distillation
from hf_mla_conversion.mathematics.distill import ChunkedDivergence, DistillationTrainer, divergence
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.text import read_text, token_windows
from hf_mla_conversion.stages.end_to_end import Training, Windows, distil, training_arguments


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model and its conversion in closed form, sequences of 64 tokens."""
    folder = tmp_path_factory.mktemp("pair")
    source = make_source(folder / "source", max_position_embeddings=64)
    convert(source, str(folder / "mla"), kv_lora_rank=8, qk_rope_head_dim=4, calibration_tokens=4096, steps=0, device="cpu")
    return source, str(folder / "mla")


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """The bundled model in closed form, with few latents: a few steps make it better."""
    out = str(tmp_path_factory.mktemp("rough") / "mla")
    amounts = {"calibration": CALIBRATION, "calibration_tokens": 4096, "steps": 0, "heal_tokens": 0}
    convert(MODEL, out, kv_lora_rank=16, qk_rope_head_dim=8, device="cpu", **amounts)
    return out


def small(pair, dest, **changes):
    """Heal the small model in a few steps."""
    source, out = pair
    options = {"teacher": source, "text": CALIBRATION, "steps": 10, "step_tokens": 256, "device": "cpu"}
    return heal(out, str(dest), **(options | changes))


def weights(folder):
    """All weights of a checkpoint."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def curve(report):
    """Held-out perplexity by step."""
    return {entry["step"]: entry["perplexity"] for entry in report["history"] if "perplexity" in entry}


@pytest.mark.parametrize("trained", [True, False])
def test_the_divergence_is_pytorchs(trained):
    torch.manual_seed(0)
    states, target = torch.randn(2, 3000, 16, dtype=torch.float64).requires_grad_()
    student, teacher = nn.Linear(16, 50).double().requires_grad_(trained), nn.Linear(16, 50).double()
    first, second = student(states).log_softmax(-1), teacher(target).log_softmax(-1)
    expected = nn.KLDivLoss(reduction="batchmean", log_target=True)(first, second)
    measured = ChunkedDivergence.apply((student, teacher, divergence), states, target.detach(), *student.parameters())
    assert measured.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = [states, *student.parameters()] if trained else [states]
    for slope, reference in zip(torch.autograd.grad(3 * measured, wanted), torch.autograd.grad(3 * expected, wanted), strict=True):
        torch.testing.assert_close(slope, reference, rtol=1e-5, atol=1e-9)


FINISHED = {
    "Granite": {"logits_scaling": 3.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},
    "Cohere2": {"logit_scale": 0.3},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Phi": {},  # its head has a bias
    "GPTNeoX": {},  # decoder and head have other names
    "Mixtral": {"num_local_experts": 4},
}


def distiller(student, teacher, ids, folder):
    """A trainer of all weights, which begins with these windows."""
    arguments = training_arguments(folder, Training("all", 1, 1e-3, 2, 1, 0, 1), torch.device("cpu"), 1, False)
    datasets = {"train_dataset": Windows(ids), "eval_dataset": Windows(ids)}
    return DistillationTrainer(teacher=teacher.requires_grad_(False), folder=folder, model=student, args=arguments, **datasets)


@pytest.mark.parametrize("family", FINISHED)
def test_the_loss_is_of_the_logits_as_the_library_computes_them(tmp_path, family):
    """Whatever a family does to what its head computes."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(make_source(tmp_path, family, std=std, **FINISHED[family])) for std in (0.2, 0.25)
    )
    ids = torch.randint(3, 4096, (2, 32))
    logits = [model(ids, use_cache=False).logits.flatten(0, 1) for model in (student, teacher.eval())]
    expected = divergence(logits[0], logits[1].detach(), len(logits[0]))[0] / len(logits[0])
    parameters = [*student.parameters()]
    wanted = torch.autograd.grad(
        nn.functional.kl_div(*(part.log_softmax(-1) for part in logits), log_target=True, reduction="batchmean"), parameters
    )
    text = nn.functional.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    trainer = distiller(student, teacher, ids, tmp_path)
    loss = trainer.compute_loss(student.train(), {"input_ids": ids})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 1e-3
    for slope, reference in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(slope, reference, rtol=1e-3, atol=1e-5)
    assert trainer.compute_loss(student.eval(), {"input_ids": ids}).item() == pytest.approx(text.item(), rel=1e-5)


@pytest.mark.parametrize(("window", "implementation"), [(None, distillation.UNMASKED), (32, distillation.UNMASKED), (8, "sdpa")])
def test_the_library_makes_no_masks_where_none_are_needed(tmp_path, monkeypatch, window, implementation):
    sources = (make_source(tmp_path, "Mistral", std=std, sliding_window=window) for std in (0.2, 0.25))
    student, teacher = map(AutoModelForCausalLM.from_pretrained, sources)
    ids = torch.randint(3, 4096, (2, 32))
    logits = [model(ids, use_cache=False).logits.flatten(0, 1).detach() for model in (student, teacher.eval())]
    expected = divergence(*logits, len(logits[0]))[0] / len(logits[0])
    trainer = distiller(student, teacher, ids, tmp_path)

    def train(self):
        assert student.config._attn_implementation == teacher.config._attn_implementation == implementation
        return self.compute_loss(student.train(), {"input_ids": ids}).item()

    monkeypatch.setattr(Trainer, "train", train)
    assert trainer.train() == pytest.approx(expected.item(), rel=1e-5)
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("train", ["lora", "attention", "layers", "all"])
def test_what_is_trained_changes_and_nothing_else(rough, tmp_path, train):
    options = {"steps": 6, "step_tokens": 1024, "learning_rate": 1e-3, "device": "cpu"}
    report = heal(rough, str(tmp_path / "healed"), teacher=MODEL, text=CALIBRATION, train=train, **options)
    assert report.verify.perplexity.converted < 0.99 * curve(vars(report))[0]
    before, after = weights(rough), weights(tmp_path / "healed")
    assert before.keys() == after.keys()  # adapters are merged
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in changed if "norm" in name}
    if train in ("layers", "all"):
        assert ("model.embed_tokens.weight" in changed) == (train == "all") and any(".mlp." in name for name in changed)
    else:
        attention = {name for name in changed if ".self_attn." in name}
        assert attention and (changed == attention if train == "attention" else any(".mlp." in name for name in changed))
        assert train == "attention" or not norms
    if train != "lora":
        parts = {"attention": [".self_attn."], "layers": [".layers.", "model.norm."], "all": [""]}[train]
        trained = sum(tensor.numel() for name, tensor in before.items() if any(part in name for part in parts))
        assert report.trained_parameters == trained
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_trained_model_gets_closer_to_its_source(converted, tmp_path):
    from hf_mla_conversion import verify

    dest = str(tmp_path / "healed")
    options = {"steps": 12, "step_tokens": 1024, "learning_rate": 3e-4, "device": "cpu"}
    report = heal(converted[0], dest, teacher=MODEL, text=CALIBRATION, **options)
    ratios = [
        verify(out, against=MODEL, text=VALIDATION, tokens=4096, device="cpu").perplexity_ratio for out in (converted[0], dest)
    ]
    assert ratios[1] < ratios[0]  # on text that neither has seen
    record = json.loads((tmp_path / "healed" / "conversion.json").read_text())
    (healing,) = record["healing"]
    assert record["report"]["layers"] and healing["recipe"]["steps"] == 12
    assert healing["report"]["verify"]["perplexity_ratio"] == report.verify.perplexity_ratio
    card = (tmp_path / "healed" / "README.md").read_text()
    assert f"(x {report.verify.perplexity_ratio:.4f})" in card and card.index("## Healing") < card.index("## Limits")
    assert card.count('from_pretrained("healed"') == 2
    assert {path.name for path in Path(converted[0]).iterdir()} == {path.name for path in Path(dest).iterdir()}


def test_adapters_of_the_trained_rank(pair, tmp_path):
    from hf_mla_conversion.commands.heal import trained_parameters
    from hf_mla_conversion.source.checkpoint import open_checkpoint
    from hf_mla_conversion.stages.end_to_end import Training, prepare

    adapted = prepare(
        AutoModelForCausalLM.from_pretrained(pair[1]), Training("lora", 1, 1e-3, 1, 1, seed=0, patience=1, lora_rank=3)
    )
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained_parameters(match_model(open_checkpoint(pair[1])), "lora", 3) == trained
    assert not any("lm_head" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("best", "taken"), [(0, healer.PATIENCE + 1), (3, healer.PATIENCE + 3)])
def test_it_stops_by_itself_and_keeps_the_best(pair, tmp_path, monkeypatch, best, taken):
    """The training is real; what is measured on held-out text falls up to a step, and rises from there on."""
    compute_loss, seen = distillation.DistillationTrainer.compute_loss, {}

    def measured(self, model, *args, **kwargs):
        if model.training:
            return compute_loss(self, model, *args, **kwargs)
        step = self.state.global_step
        seen[step] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return torch.tensor(1.0 + abs(step - best)), {}

    monkeypatch.setattr(distillation.DistillationTrainer, "compute_loss", measured)
    report = small(pair, tmp_path / "healed", train="all", steps=20)
    assert report.stopped_early and report.steps_taken == taken == max(seen)
    written = weights(tmp_path / "healed")
    assert not torch.equal(written["lm_head.weight"], seen[taken]["lm_head.weight"])
    assert all(torch.equal(tensor, seen[best][name]) for name, tensor in written.items())


def test_a_broken_layer_is_named_and_the_last_checkpoint_kept(pair, tmp_path, monkeypatch):
    step_end = distillation.Healing.on_step_end

    def break_layer(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 6:
            self.trainer.model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.inf

    monkeypatch.setattr(distillation.Healing, "on_step_end", break_layer)
    with pytest.raises(UserError, match="at step 6: layer 1 is the first .* is kept in"):
        small(pair, tmp_path / "healed")
    monkeypatch.undo()
    assert not (tmp_path / "healed").exists() and list(tmp_path.glob(".healed.incomplete/checkpoint-4/complete"))
    report = small(pair, tmp_path / "healed")  # goes on from step 4
    assert report.steps_taken == 10 and math.isfinite(report.verify.perplexity_ratio)


def test_a_finished_training_is_not_trained_on(pair, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(healer, "write_trained", full)
    with pytest.raises(UserError, match="No space left on device; what is done so far is kept in"):
        small(pair, tmp_path / "healed", steps=3)
    monkeypatch.undo()
    monkeypatch.setattr(distillation.DistillationTrainer, "train", full)
    assert small(pair, tmp_path / "healed", steps=3).steps_taken == 3


def test_what_is_measured_is_what_is_written(pair, tmp_path):
    report = small(pair, tmp_path / "healed", learning_rate=1e-30, steps=2)
    assert report.verify.perplexity.converted == pytest.approx(curve(vars(report))[0], rel=1e-5)  # a loss of 10 in float32


def test_types_are_kept(pair, tmp_path):
    convert(pair[0], str(tmp_path / "half"), kv_lora_rank=8, qk_rope_head_dim=4, calibration_tokens=4096, steps=0, dtype="float16")
    small((pair[0], str(tmp_path / "half")), tmp_path / "healed", steps=2)
    before, after = weights(tmp_path / "half"), weights(tmp_path / "healed")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in after.items()}
    assert all(tensor.isfinite().all() for tensor in after.values())


def heal_killed(words):
    """The program, which kills itself in the middle of a step after a checkpoint."""
    compute_loss = distillation.DistillationTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(self, *args, **kwargs)

    distillation.DistillationTrainer.compute_loss = killed
    return main(words)


def test_killed_and_resumed_it_ends_the_same(pair, tmp_path):
    source, out = pair
    options = {"teacher": source, "text": CALIBRATION, "steps": 22, "step_tokens": 256, "device": "cpu"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    work = tmp_path / ".killed.incomplete"
    code, said = run_apart(tmp_path / "log", heal_killed, ["heal", out, str(tmp_path / "killed"), *words])
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "killed").exists() and (work / "checkpoint-8" / "complete").exists()
    with pytest.raises(UserError, match="seed"):
        heal(out, str(tmp_path / "killed"), **options, seed=1)
    resumed, whole = (heal(out, str(tmp_path / name), **options) for name in ("killed", "whole"))
    assert curve(vars(resumed)) == pytest.approx(curve(vars(whole)), rel=1e-4)
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in whole.history]
    assert not work.exists()


def test_two_processes_reach_the_loss_of_one(converted, tmp_path):
    config = tmp_path / "fsdp.yaml"
    example = (Path(__file__).parent.parent / "examples" / "heal_accelerate.yaml").read_text()
    config.write_text(example.replace("mixed_precision: bf16", "mixed_precision: 'no'\nuse_cpu: true"))
    text = ["--teacher", MODEL, "--text", CALIBRATION, "--steps", "4", "--step-tokens", "2048", "--device", "cpu", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launch, str(Path(__file__).parent / "fsdp_on_cpu.py"), "heal", converted[0], str(tmp_path / "two"), *text],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    one = heal(converted[0], str(tmp_path / "one"), teacher=MODEL, text=CALIBRATION, steps=4, step_tokens=2048, device="cpu")
    assert two["tokens_per_step"] == one.tokens_per_step and len(curve(two)) == 5
    # The same text in the same order.
    assert two["verify"]["perplexity"]["converted"] == pytest.approx(one.verify.perplexity.converted, rel=1e-3)
    assert curve(two) == pytest.approx(curve(vars(one)), rel=1e-3)
    trained = [[entry["divergence"] for entry in history if "divergence" in entry] for history in (two["history"], one.history)]
    assert trained[0] == pytest.approx(trained[1], rel=1e-3)


@pytest.mark.parametrize("count", [3, 41, 381, 5000])
def test_what_is_held_back_is_whole_batches(tmp_path, count):
    held = healer.held_back(torch.zeros(count, 64, dtype=torch.long), 64, 64)
    assert held.bit_count() == 1 and held <= max(1, count / 20) and (held == 32 or 2 * held > count // 20)
    for micro in (1, 3, 8):
        training = Training("all", 10, 1e-3, micro, 1, 0, 3)
        for windows in (held, 6):
            size = training_arguments(tmp_path, training, torch.device("cpu"), windows, False).per_device_eval_batch_size
            assert size <= micro and windows % size == 0


def test_one_process_trains_on_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    training = Training("all", 10, 1e-3, 1, 1, 0, 3)
    assert training_arguments(tmp_path, training, torch.device("meta"), 2, False).n_gpu == 1  # no CPU's, no half precision


def test_a_dry_run_writes_nothing(pair, tmp_path):
    dest = tmp_path / "healed"
    plans = {train: small(pair, dest, train=train, dry_run=True).memory_bytes for train in ("lora", "attention", "layers", "all")}
    assert not list(tmp_path.iterdir())
    trained = {train: plan["gradients_and_optimizer"] for train, plan in plans.items()}
    assert trained["lora"] < trained["layers"] and trained["attention"] < trained["layers"] < trained["all"]
    assert all(plan["total"] == sum(plan.values()) - plan["total"] for plan in plans.values())
    less = small(pair, dest, gradient_checkpointing=True, dry_run=True).memory_bytes
    assert less["activations"] < plans["attention"]["activations"]


def test_gradient_checkpointing_gives_the_same_weights(pair, tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        small(pair, tmp_path / name, steps=3, gradient_checkpointing=checkpointing)
    other = weights(tmp_path / "checkpointed")
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(tensor, other[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "mlp"}, "--train is mlp; allowed: lora, attention, layers, all"),
        ({"steps": 0}, "--steps is 0; allowed: 1 or more"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"train": "lora", "lora_rank": 49}, "--lora-rank is 49; allowed: 1 to 48"),
        ({"step_tokens": 1 << 24}, "lower --step-tokens, or give more text"),
        ({"learning_rate": math.nan}, "--learning-rate is nan; it must be positive"),
        ({"step_tokens": 0}, "--step-tokens is 0"),
        ({"text": "nowhere.txt"}, "there is no text file nowhere.txt"),
        ({"text": ["lookups"]}, "--text lookups is made of other texts; give one beside it"),
        ({"teacher": MODEL}, "it was converted from another model"),
    ],
)
def test_bad_input_is_one_line(pair, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        small(pair, tmp_path / "healed", **changes)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_several_texts_and_lookups(pair, tmp_path, monkeypatch):
    """Half as many of lookups as of another text; none of them is held back."""
    seen = []
    monkeypatch.setattr(healer, "distil", lambda *arguments: seen.append(arguments[2:4]) or distil(*arguments))
    report = small(pair, tmp_path / "healed", text=[CALIBRATION, VALIDATION, "lookups"])
    assert report.verify.perplexity_ratio > 0
    ((trained, held),) = seen
    tokenizer, texts = AutoTokenizer.from_pretrained(pair[0]), []
    for name in (CALIBRATION, VALIDATION):
        windows = token_windows(read_text(name, 1 << 14), tokenizer, 1 << 14, report.window)
        texts.append({tuple(ids.tolist()) for ids in windows})
    found = [[tuple(ids.tolist()) in text for text in texts] for ids in torch.cat([trained, held])]
    assert len(found) == 2 * (16 + healer.HELD_BACK) + 8 and sum(map(any, found)) == len(found) - 8
    assert all(any(places) for places in found[len(trained) :])
    assert 0 < sum(first for first, _ in found[len(trained) :]) < len(held)  # of both


def test_too_little_text_is_refused(pair, tmp_path):
    (tmp_path / "short.txt").write_text("A few words only. " * 8)
    with pytest.raises(UserError, match="are the least here"):
        small(pair, tmp_path / "healed", text=str(tmp_path / "short.txt"))


def test_a_source_is_not_healed(pair, tmp_path):
    with pytest.raises(UserError, match="not a converted model"):
        small((pair[0], pair[0]), tmp_path / "healed")
