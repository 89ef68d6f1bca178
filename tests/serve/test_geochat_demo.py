"""The command of GeoChat's repository starts the web demo with the options people know."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from geochat.chat.arguments import add_model_arguments

DEMO = Path(__file__).resolve().parents[2] / "geochat_demo.py"


def test_it_is_the_web_demo(monkeypatch, capsys) -> None:
    if importlib.util.find_spec("geochat.serve.gradio_web_server") is None:
        pytest.skip("this copy has no web demo")
    monkeypatch.setattr(sys, "argv", [str(DEMO), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(DEMO), run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--model-path", "--model-base", "--load-8bit", "--load-4bit", "--conv-mode", "--device"):
        assert flag in said


def test_the_options_people_know() -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    words = "--model-path m --model-base b --load-8bit --conv-mode vicuna_v1 --device cuda:1"
    arguments = parser.parse_args(words.split())
    assert (arguments.model_path, arguments.model_base) == (Path("m"), Path("b"))
    assert (arguments.load_8bit, arguments.load_4bit) == (True, False)
    assert (arguments.conv_mode, arguments.device) == ("vicuna_v1", "cuda:1")
    assert parser.parse_args(["--model-path", "m", "--conv-mode", "llava_v1"]).conv_mode
