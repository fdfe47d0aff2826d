"""Every example runs from the command line as its docstring says, and does what it is there to show."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from conftest import run_apart


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(words, folder, *arguments):
    """What an example prints, and its other output: `words` run it, in an empty folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where hf-mla is
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "PATH": path}
    done = subprocess.run([*words, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def correct(output):
    """The two scores that a fine-tuning prints, in percent."""
    return [int(score) for score in re.findall(r"^correct (?:before|after): (\d+)%", output, re.MULTILINE)]


def test_generate(tmp_path):
    output, _ = run([sys.executable, EXAMPLES / "generate.py"], tmp_path)
    assert "The captain looked at the sea and" in output
    assert "cached" in output


def test_finetune_lora(tmp_path):
    output, _ = run([sys.executable, EXAMPLES / "finetune_lora.py"], tmp_path, "--out", "backwards")
    before, after = correct(output)
    assert before < 10 and after > 80
    said, answer = re.search(r"^Say (.+) backwards: (.+)\.$", output, re.MULTILINE).groups()
    assert sorted(said.split()) == sorted(answer.split())
    assert re.search(r"cached \d+ tokens in [\d,]+ bytes", output)
    assert not list((tmp_path / "backwards").glob("adapter*"))  # merged


def test_finetune_sft(tmp_path, converted):
    output, _ = run([sys.executable, EXAMPLES / "finetune_sft.py"], tmp_path, converted[0], "--out", "chat")
    before, after = correct(output)
    assert before < 10 and after > 80
    assert re.search(r"^(My|Your) .+\. -> So (my|your) .+\.$", output, re.MULTILINE)
    assert (tmp_path / "chat" / "chat_template.jinja").exists()


def test_convert_and_heal(tmp_path):
    output, messages = run([EXAMPLES / "convert_and_heal.sh"], tmp_path)
    ours = re.compile(
        r"(surveying|converting|measuring|healing|measuring at [\d,]+ tokens): .*|step \d+: held-out perplexity [\d.]+"
    )
    assert not [line for line in messages.splitlines() if line.strip() and not ours.fullmatch(line)]  # of other libraries
    before, after = map(float, re.search(r"^held-out perplexity +([\d.]+) -> ([\d.]+);", output, re.MULTILINE).groups())
    assert after < 0.96 * before
    verified = float(re.search(r"^at 1,024 tokens .+\(x ([\d.]+)\)", output, re.MULTILINE).group(1))
    assert 1 < verified < 2
    assert (tmp_path / "bundled-mla-healed" / "config.json").exists()


@pytest.mark.parametrize("name", ["heal_accelerate.yaml", "heal_deepspeed.yaml"])
def test_accelerate_takes_the_configuration(name):
    config = load_config_from_file(str(EXAMPLES / name))  # refuses keys that it does not know
    options = config.fsdp_config or config.deepspeed_config
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert options and options.keys() <= known.keys()  # these it would ignore
    if config.distributed_type == DistributedType.FSDP:  # DeepSpeed's needs DeepSpeed
        settings = {key if key == "fsdp_version" else key.removeprefix("fsdp_"): value for key, value in options.items()}
        assert FullyShardedDataParallelPlugin(**settings).fsdp_version == 2


def code_cells():
    """Of each cell with code in the notebook: the code, what it has printed, and how many pictures it has drawn."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds = [output["output_type"] for output in cell["outputs"]]
            assert {*kinds} <= {"stream", "display_data"}  # no errors
            pictures = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
            printed = "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
            yield "".join(cell["source"]), printed, len(pictures)


def run_notebook(results):
    """Run the cells in one namespace, as a kernel does, and write what each printed and drew."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    tempfile.tempdir = str(results.parent)
    done, namespace = [], {"__name__": "__main__"}
    for source, _, _ in code_cells():
        pictures, printed = [], io.StringIO()
        plt.show = lambda drawn=pictures: (drawn.extend(plt.get_fignums()), plt.close("all"))
        with contextlib.redirect_stdout(printed):
            exec(source, namespace)
        done.append((printed.getvalue(), len(pictures)))
    results.write_text(json.dumps(done), encoding="utf-8")


def test_quickstart_notebook(tmp_path):
    """It runs, and what stands in it is what came of it: to the words, not to numbers and texts, which are the machine's."""
    code, log = run_apart(tmp_path / "log", run_notebook, tmp_path / "results.json")
    assert code == 0, log

    def words(printed):
        return [re.sub(r"\d[\d,.]*", "#", " ".join(line.split()[:4])) for line in printed.splitlines()]

    done = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(words(printed), pictures) for printed, pictures in done] == [(words(text), count) for _, text, count in code_cells()]
    for outputs in ([printed for printed, _ in done], [text for _, text, _ in code_cells()]):
        text = "".join(outputs)
        assert "192 -> 60 numbers per token and layer" in text and "69% less cache" in text
        assert "142,848 bytes for 31 tokens" in text and "44,640 bytes for 31 tokens" in text
        assert "lighthouse is that the keeper paints the moon on the window every night." in text  # which it learnt
        assert float(re.search(r"DeepseekV3ForCausalLM, .* logits (\S+)", text)[1]) < 1e-3
