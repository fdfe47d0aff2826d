# SPDX-License-Identifier: Apache-2.0
"""The first stage of a conversion: every layer by itself.

A survey (`survey.py`) leaves the gradient moments of all layers, and tries the ways to spend a budget. Then every layer is
converted in closed form (`closed_form.py`), fitted to the original (`reconstruct.py`) and written to disk, and the hidden states
of all calibration text are passed through the original layer, to be what the next one gets.

No layer's result depends on another's: under `accelerate launch` each process converts one at a time. It passes its share of the
text through the layers before, and hands its hidden states to the process whose layer they enter. Batches are those of a single
process, and so are the bytes of the result.
"""

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from hf_mla.configuration_mla import layer_type
from hf_mla.layer_mla import MLAAttention, rotary_embedding

from ..errors import UserError
from ..mathematics.closed_form import convert_attention, mla_config
from ..mathematics.measures import Comparison
from ..mathematics.moments import LayerMoments
from ..mathematics.reconstruct import NORM_EPS, LayerTask, fit_layer, interleaved, mixed
from ..mathematics.scales import SCALES, SURVEY_TOKENS
from ..mathematics.survey import advance, gradient_moments, layer_inputs, survey
from ..output.progress import layer_file, save_layer, size_folder, write_json
from ..output.reports import Candidate, LayerReport, TextReport, with_sides
from ..source.attention import attention_of
from ..source.loading import compute_dtype
from ..source.lookups import LOOKUPS
from ..source.matching import ModelCheckpoint
from ..source.own_text import OWN_TEXT
from ..source.shards import load_file
from ..source.streaming import LayerStream, allocate
from ..source.text import begun
from .hidden_states import HiddenStates
from .windows import first_tokens, hold_back, joined, shared_batches, shorter, whole_runs


logger = logging.getLogger(__name__)

FIRST_LENGTH = 64  # tokens in a sequence of which each sees itself alone, as if it came first
JUDGED_WINDOWS = 16  # by which the context is judged that the model is trained for
PROBED_LAYERS, PROBE_STEPS = 3, 60
TIE = 0.1  # of the error of a split: what a wider rotary key is worth in contexts longer than the calibration's sequences


@contextmanager
def repeatable(wanted: bool = True) -> Iterator[None]:
    """Make a GPU compute the same numbers every time, so that what is resumed ends as if uninterrupted; else as fast as it can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False  # costs time, and nothing reads it
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


class Job:
    """One conversion: the source, its calibration text, and the folder that keeps what is done.

    Args:
        checkpoint: the source.
        folder: where results are kept.
        texts: token ids [windows, tokens] of each text, by its name.
        tokens: of each text to calibrate the layers on; the rest is for the end-to-end stage alone.
        device: where to compute.
        steps: reconstruction steps per layer.
        seed: of the order of windows.
        qk_norm: "exact" or "fold".
        begin: the token that every sequence begins with, if there is one.
        run: how many windows that follow one another in the texts make a long sequence for the end-to-end stage.
    """

    def __init__(
        self,
        checkpoint: ModelCheckpoint,
        folder: Path,
        texts: dict[str, Tensor],
        tokens: int,
        device: torch.device,
        steps: int,
        seed: int,
        qk_norm: str,
        begin: int | None = None,
        run: int = 1,
    ) -> None:
        self.checkpoint, self.folder, self.device = checkpoint, folder, device
        self.steps, self.seed, self.qk_norm, self.begin, self.run = steps, seed, qk_norm, begin, run
        self.scale = SCALES[device.type]
        self.stream = LayerStream(checkpoint, device, compute_dtype(checkpoint, device))
        window = min(windows.shape[1] for windows in texts.values())  # a text that is shorter than a window has shorter ones
        self.count, self.drawn = max(2, tokens // window), run  # windows of each text, and how many were drawn together
        self.cut = {name: shorter(windows, window) for name, windows in texts.items()}
        self.split(window)

    def split(self, window: int) -> None:
        """Cut the calibration windows into shorter ones, and say what each is for.

        `windows` are those of all texts; `train`, `held` and `surveyed` are places among them. `firsts` are tokens that come first
        in a sequence; the layers are called with `alone` for them.
        """
        before = next(iter(self.cut.values())).shape[1]
        if window < before:
            self.cut = {name: shorter(windows, window) for name, windows in self.cut.items()}
            self.count, self.run = self.count * (before // window), 1
        counts = {name: whole_runs(min(self.count, len(windows)), self.run) for name, windows in self.cut.items()}
        self.texts = {name: begun(windows[: counts[name]], self.begin) for name, windows in self.cut.items()}
        self.windows = torch.cat(list(self.texts.values()))
        self.stream.record_calls(window)
        self.batch = max(1, self.scale.batch // window)  # windows
        self.train, self.held = hold_back(self.texts, self.run)
        if self.drawn > 1:  # for the first of them to be of many places
            generator = torch.Generator().manual_seed(self.seed)
            self.train = [places[torch.randperm(len(places), generator=generator)] for places in self.train]
        self.surveyed = interleaved(self.train)[: max(4, SURVEY_TOKENS // window)]
        length = min(FIRST_LENGTH, window)
        self.alone = self.stream.calls_alone(length)
        self.firsts = first_tokens(self.windows, self.begin, length, self.scale.first, self.seed)

    @property
    def held_back(self) -> Tensor:
        """Token ids [windows, tokens] that nothing is fitted to, of all texts."""
        return self.windows[torch.cat(list(self.held.values()))]

    def rows(self, run: int) -> tuple[dict[str, Tensor], Tensor]:
        """Sequences for the end-to-end stage, of so many windows that follow one another in a text.

        Args:
            run: windows in a sequence.

        Returns:
            Token ids [sequences, run * tokens] of each text without what is held back, and those that are held back, of all texts
            but lookups, which flatter.
        """
        train, held = {}, []
        for name, windows in self.cut.items():
            stop = len(self.texts[name])
            start = stop - len(self.held[name])
            train[name] = begun(joined(torch.cat([windows[:start], windows[stop:]]), run), self.begin)
            if name != LOOKUPS:
                held.append(begun(joined(windows[start:stop], run), self.begin))
        return train, torch.cat(held)

    def config(self, rank: int, rope_dim: int, dtype: str) -> Any:
        """The configuration of the converted model."""
        config = mla_config(self.stream.config, rank, rope_dim, dtype, self.qk_norm)
        config._attn_implementation = self.stream.model.config._attn_implementation
        if self.steps:
            config.kv_a_layernorm_eps = NORM_EPS
        return config

    def prepare(self, sizes: list[tuple[int, int]], processes: Any) -> list[Candidate]:
        """Survey the model, settle the length of the windows, and try the sizes if there are several.

        Args:
            sizes: rank and rotary width of each.
            processes: the main one surveys, the others wait; sizes are tried by all.

        Returns:
            The sizes with their errors.
        """
        surveyed, prepared = self.folder / "surveyed.json", self.folder / "prepared.json"
        if processes.is_main_process and not surveyed.exists():
            while (context := self.survey()) < self.windows.shape[1]:
                logger.warning(
                    "%s predicts worse beyond %s tokens of context than within: calibrating on sequences of that length",
                    self.checkpoint.name,
                    f"{context:,}",
                )
                self.split(context)
            write_json({"window": context}, surveyed)
        processes.wait_for_everyone()
        self.split(json.loads(surveyed.read_text(encoding="utf-8"))["window"])
        if not broadcast_object_list([prepared.exists()])[0]:
            errors = self.try_sizes(sizes, processes) if len(sizes) > 1 else [0.0]
            if processes.is_main_process:
                candidates = [asdict(Candidate(*size, error)) for size, error in zip(sizes, errors, strict=True)]
                write_json(candidates, prepared)
        processes.wait_for_everyone()
        for inputs in self.folder.glob("inputs-*") if processes.is_main_process else ():
            inputs.unlink()
        return [Candidate(**entry) for entry in json.loads(prepared.read_text(encoding="utf-8"))]

    def survey(self) -> int:
        """Survey the model; returns the context that it shows to be trained for."""
        names, places = [name for name, windows in self.texts.items() for _ in windows], interleaved(self.train)
        # Sequences of own text are put end to end, and no context tells what new thing is looked up next.
        whole = torch.tensor([names[place] not in (OWN_TEXT, LOOKUPS) for place in places.tolist()])
        count = len(self.surveyed)
        more = places[count:][whole[count:]][: max(0, JUDGED_WINDOWS - int(whole[:count].sum()))]
        return survey(self.stream, self.windows[self.surveyed], self.batch, self.folder, whole[:count], self.windows[more])

    def try_sizes(self, sizes: list[tuple[int, int]], processes: Any) -> list[float]:
        """Mean error of a few layers at each size, on surveyed text that they were not fitted to (of four windows and more)."""
        surveyed = torch.arange(len(self.surveyed))  # places in what the survey left
        count = len(surveyed) - len(surveyed) // 4
        train, held = surveyed[:count], surveyed[count:] if len(surveyed) >= 4 else surveyed
        total = len(self.stream)
        probed = sorted({total * (2 * i + 1) // (2 * PROBED_LAYERS) for i in range(PROBED_LAYERS)})
        tries = {
            (index, size): self.folder / f"tried-{index:04}-{size[0]}+{size[1]}.json"
            for index, size in itertools.product(probed, sizes)
        }
        for index, size in tqdm([*tries][processes.process_index :: processes.num_processes], desc="trying sizes", unit="try"):
            if not tries[index, size].exists():
                config = self.config(*size, "float32")
                states, steps = layer_inputs(self.folder, index), min(self.steps, PROBE_STEPS)
                with self.stream.layer(index) as layer:
                    _, report, _ = self.convert_layer(index, layer, states, config, [train], {"": held}, steps)
                write_json(report.error, tries[index, size])
        processes.wait_for_everyone()
        errors = {place: json.loads(file.read_text(encoding="utf-8")) for place, file in tries.items()}
        return [sum(errors[index, size] for index in probed) / len(probed) for size in sizes]

    def convert_layers(self, config: Any, processes: Any) -> None:
        """Convert the layers that are not done yet, as many at a time as there are processes."""
        folder, count, mine = size_folder(self.folder, config), processes.num_processes, processes.process_index
        left = [index for index in range(len(self.stream)) if not layer_file(folder, index).exists()]
        left = broadcast_object_list([left])[0]  # as the main process saw it before any was written
        if not left:
            return
        folder.mkdir(exist_ok=True)
        if self.compiles():
            torch.compiler.reset()  # what is left of another size counts against what may be compiled
        entering = HiddenStates(self, processes)
        with tqdm(total=len(self.stream), initial=len(self.stream) - len(left), desc="converting", unit="layer") as progress:
            for turn in (left[start : start + count] for start in range(0, len(left), count)):
                for owner, index in enumerate(turn):
                    entering.advance_to(index)
                    entering.hand_over(owner)
                if mine < len(turn):
                    with self.stream.layer(turn[mine]) as layer:
                        self.convert_and_save(turn[mine], layer, entering.whole, entering.whole_firsts, config)
                        if count == 1:  # while it is there
                            entering.pass_through(layer)
                progress.update(len(turn))

    def compiles(self) -> bool:
        """Whether the steps of all layers, done already or not, are worth compiling: it may not depend on where work goes on."""
        return self.steps * len(self.stream) >= self.scale.compiled

    def convert_and_save(self, index: int, layer: Any, states: Tensor, firsts: Tensor, config: Any) -> None:
        """Convert a layer to its file, with what `convert_layer` takes."""
        arguments = states, config, self.train, self.held, self.steps, firsts
        mla, report, spectrum = self.convert_layer(index, layer, *arguments, compiled=self.compiles())
        stored, weights = stored_type(config), {}
        for name, tensor in mla.state_dict().items():
            # The identity norm's weight is beyond float16; it stays float32 there, as the model loads it.
            wide = stored == torch.float16 and name.startswith("kv_a_layernorm")
            weights[name] = tensor.to("cpu", torch.float32 if wide else stored)
        save_layer(layer_file(size_folder(self.folder, config), index), weights, report, spectrum.tolist())

    def convert_layer(
        self,
        index: int,
        layer: Any,
        states: Tensor,
        config: Any,
        train: list[Tensor],
        held: dict[str, Tensor],
        steps: int,
        firsts: Tensor | None = None,
        *,
        compiled: bool = False,
    ) -> tuple[MLAAttention, LayerReport, Tensor]:
        """Convert one layer. Kept is what has the least error on held-back text: the fit, at its end or before, or the closed form.

        Args:
            index: which.
            layer: the original, with its weights.
            states: hidden states that enter it [windows, tokens, D].
            config: of the converted model.
            train: windows of each text to fit to.
            held: windows of each text to measure errors on, by its name.
            steps: of reconstruction.
            firsts: hidden states that enter it, of tokens that each come first in a sequence [sequences, tokens, D].
            compiled: as for `LayerTask`.

        Returns:
            The converted attention, its errors, and its spectrum.
        """
        task, window = self.task(index, layer, states, config, firsts, compiled), states.shape[1]
        fit = interleaved(train)[: max(1, self.scale.fit // window)].split(self.batch)
        judges = torch.cat(list(held.values())).split(self.batch)
        moments = LayerMoments(task.input_moment(fit), *gradient_moments(self.folder, index, self.device))
        mla, spectrum = convert_attention(attention_of(layer), moments, config)
        task.fit_output(mla, fit)
        closed = task.error(mla, judges)
        reconstructed, kept = None, 0
        if steps:
            size = min(max(1, self.scale.step // window), sum(map(len, train)))
            order = mixed(train, size, steps, (self.seed * len(self.stream) + index) % 2**63)
            keep = stored_type(config) != torch.float16  # which has no room for the norm of a closed form
            reconstructed, kept = fit_layer(mla, task, order, fit, judges, closed, keep=keep)
            if not math.isfinite(reconstructed):
                raise UserError(f"the reconstruction of layer {index} did not converge; try --steps 0, or another --calibration")
        by_text = {name: task.error(mla, windows.split(self.batch)) for name, windows in held.items()}
        return mla, LayerReport(index, max(0.0, 1 - closed), closed, reconstructed, kept, by_text), spectrum

    def task(self, index: int, layer: Any, states: Tensor, config: Any, firsts: Tensor | None, compiled: bool) -> LayerTask:
        """What the converted layer is to do, with what `convert_layer` takes."""
        rotation, first = self.rotation(config, index, states), None
        if firsts is not None:
            cut = tuple(part[:, : firsts.shape[1]] for part in rotation)
            first = LayerTask(layer, self.alone[index], firsts, cut, self.device)
        return LayerTask(layer, self.stream.calls[index], states, rotation, self.device, first, compiled)

    def rotation(self, config: Any, index: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for a layer of a converted model, for one sequence as long as those of hidden states."""
        rotary = rotary_embedding(config, type(self.stream.rotary)).to(self.device)
        place = states[:1, :, :1].to(self.device), self.stream.calls[index]["position_ids"]
        kind = layer_type(config, index)
        return rotary(*place) if kind is None else rotary(*place, kind)

    @torch.no_grad()
    def measure(self, config: Any, processes: Any) -> dict[str, Comparison]:
        """Compare the converted layers with the source on each text's held-back windows, a layer of each at a time.

        Args:
            config: of the converted model.
            processes: Accelerate's state; each takes its share of the windows, whole batches.

        Returns:
            The comparisons by text, of all processes together.
        """
        batches = shared_batches(len(self.held_back), self.batch, processes.process_index, processes.num_processes)
        mine = torch.cat([torch.empty(0, dtype=torch.long), *batches])
        windows = self.held_back[mine]
        file = self.folder / f"measured-{processes.process_index}.bin"
        source = allocate((*windows.shape, config.hidden_size), self.stream.dtype, self.device, file)
        self.stream.embed(windows, source)
        converted = source.clone()
        for index in tqdm(range(len(self.stream)), desc="measuring", unit="layer"):
            call = self.stream.calls[index]
            embeddings = self.rotation(config, index, source)
            with torch.device("meta"):
                mla = MLAAttention(config, index)
            mla.load_state_dict(load_file(layer_file(size_folder(self.folder, config), index)), assign=True)
            with self.stream.layer(index) as layer:
                advance(layer, call, source, self.batch, self.device)
                name, original = config.family.attention_name, attention_of(layer)
                setattr(layer, name, mla.to(self.device, self.stream.dtype).eval())
                try:
                    advance(layer, call | {"position_embeddings": embeddings}, converted, self.batch, self.device)
                finally:
                    setattr(layer, name, original)
        comparisons = {name: Comparison() for name in self.held}
        texts = [name for name, held in self.held.items() for _ in held]
        names = [texts[place] for place in mine.tolist()]
        with self.stream.head() as head:

            def logits(states: Tensor) -> Tensor:
                return head(states.unsqueeze(0)).squeeze(0)

            for name, first, second, ids in zip(names, source, converted, windows, strict=True):
                comparisons[name].add_states(first.to(self.device), second.to(self.device), (logits, logits), ids.to(self.device))
        parts = gather_object([comparisons])
        return {name: Comparison.joined([part[name] for part in parts]) for name in comparisons}

    def closeness(self, comparisons: dict[str, Comparison]) -> dict[str, Any]:
        """What was measured on each text's held-back windows, and on all together, as fields of a `ConvertReport`.

        Lookups are not among what is taken together: text that is made to be predicted would flatter.
        """
        total, texts = Comparison.joined(comparisons[name] for name in comparisons if name != LOOKUPS), []
        for name, comparison in comparisons.items():
            held, result = len(self.held[name]) * self.windows.shape[1], with_sides(comparison.result())
            texts.append(TextReport(name=name, tokens=self.texts[name].numel(), held_back_tokens=held, **result))
        tokens = sum(text.held_back_tokens for text in texts if text.name != LOOKUPS)
        return {"held_back_tokens": tokens, "texts": texts, **with_sides(total.result())}


def best_split(candidates: list[Candidate]) -> Candidate:
    """The split of a budget with the least error, or one nearly as good with a wider rotary key: it reaches further back."""
    least = min(candidate.error for candidate in candidates)
    return max((c for c in candidates if c.error <= least * (1 + TIE)), key=lambda candidate: candidate.qk_rope_head_dim)


def stored_type(config: Any) -> torch.dtype:
    """What a converted model's numbers are stored in."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
