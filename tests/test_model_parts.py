"""`SOURCE[:PATH]`: where the reference ends and the part begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from modelcli import model_parts
from modelcli.errors import RequestError

#: Texts where no file exists.
ABSENT = {
    # builders and module expressions
    "resnet50": ("resnet50", ""),
    "resnet50:layer4": ("resnet50", "layer4"),
    "resnet50(num_classes=10):layer4.0": ("resnet50(num_classes=10)", "layer4.0"),
    "Sequential(Linear(2,3),ReLU()):0": ("Sequential(Linear(2,3),ReLU())", "0"),
    "Embedding(3,2,norm_type='a:b)'):.": ("Embedding(3,2,norm_type='a:b)')", "."),
    "torch.nn:Linear(2,3)": ("torch.nn:Linear(2,3)", ""),
    "resnet50:**:Conv2d": ("resnet50", "**:Conv2d"),
    # providers with a prefix
    "timm:resnet50": ("timm:resnet50", ""),
    "timm:resnet50:layer4": ("timm:resnet50", "layer4"),
    "timm:resnet50.a1_in1k(in_chans=1):layer4": ("timm:resnet50.a1_in1k(in_chans=1)", "layer4"),
    "hf:google-bert/bert-base-uncased@main": ("hf:google-bert/bert-base-uncased@main", ""),
    "hf:google-bert/bert-base-uncased@main(num_labels=3):encoder": (
        "hf:google-bert/bert-base-uncased@main(num_labels=3)",
        "encoder",
    ),
    "hf:C:\\models\\bert:encoder": ("hf:C:\\models\\bert", "encoder"),
    # Python objects
    "nets.py:Net": ("nets.py:Net", ""),
    "nets.py:Net(3,2):body": ("nets.py:Net(3,2)", "body"),
    "C:/work/nets.py:Net:body": ("C:/work/nets.py:Net", "body"),
    "package.module:build(path='a:b')": ("package.module:build(path='a:b')", ""),
    "package.module:build(depth=3):body": ("package.module:build(depth=3)", "body"),
    "package.module:Net:body": ("package.module:Net", "body"),
    # files
    "best.pth": ("best.pth", ""),
    "best.pth:layer4": ("best.pth", "layer4"),
    "runs/last:layer4": ("runs/last", "layer4"),
    "odd:name.pth": ("odd:name.pth", ""),
    "odd:name.pth:layer4": ("odd:name.pth", "layer4"),
    "C:\\models\\best.pth": ("C:\\models\\best.pth", ""),
    "C:\\models\\best.pth:layer4": ("C:\\models\\best.pth", "layer4"),
    "c:/models/best.safetensors:.": ("c:/models/best.safetensors", "."),
    "best.pth:": ("best.pth", ""),
}


@pytest.mark.parametrize("text", ABSENT)
def test_a_text_alone(folder: Path, text: str) -> None:
    (folder / "nets.py").unlink()
    assert model_parts.split(text) == ABSENT[text]


def test_the_colon_of_a_class_of_an_existing_file_is_not_that_of_a_part(folder: Path) -> None:
    assert model_parts.split("nets.py:Net") == ("nets.py:Net", "")
    assert model_parts.split("nets.py:Net:conv1") == ("nets.py:Net", "conv1")
    assert model_parts.split("nets.py") == ("nets.py", "")


@pytest.mark.skipif(sys.platform == "win32", reason="names of files hold no colons there")
def test_existing_files_come_first(folder: Path) -> None:
    for name in ("best.pth:layer4", "timm:resnet50", "a:b.pth", "best.pth"):
        Path(name).touch()
    for text, wanted in {
        "best.pth:layer4": ("best.pth:layer4", ""),
        "best.pth:layer4:0": ("best.pth:layer4", "0"),
        "best.pth:layer3": ("best.pth", "layer3"),
        "best.pth:a:b": ("best.pth", "a:b"),
        "a:b.pth": ("a:b.pth", ""),
        "a:b.pth:layer4": ("a:b.pth", "layer4"),
        "./timm:resnet50:layer4": ("./timm:resnet50", "layer4"),
    }.items():
        assert model_parts.split(text) == wanted


def test_a_folder_and_a_file_without_a_suffix(folder: Path) -> None:
    Path("bert").mkdir()
    Path("weights").touch()
    assert model_parts.split("bert/:encoder") == ("bert/", "encoder")
    assert model_parts.split("bert:encoder") == ("bert", "encoder")
    assert model_parts.split("weights:encoder") == ("weights", "encoder")


def test_a_builder_comes_before_a_file_of_its_name_as_in_a_reference(folder: Path) -> None:
    Path("resnet18").touch()
    assert model_parts.split("resnet18:layer4") == ("resnet18", "layer4")
    assert model_parts.split("./resnet18:layer4") == ("./resnet18", "layer4")


@pytest.mark.parametrize("text", ["", " ", ":", ":layer4"])
def test_a_text_without_a_reference_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(RequestError, match="names no model"):
        model_parts.split(text)


@pytest.mark.parametrize("text", ["a:" * 30_000, "(" * 30_000 + ":", "\0:a", "a" * 9_000 + ".pth:b", "'" * 9_000])
def test_unusual_texts_are_split_in_linear_time(folder: Path, text: str) -> None:
    name, part = model_parts.split(text)
    assert text in (name, f"{name}:{part}")


def test_paths_are_seen_from_another_folder(folder: Path) -> None:
    Path("best.pth").touch()
    Path("bert").mkdir()
    Path("work").mkdir()
    absolute = os.path.abspath("best.pth")  # noqa: PTH100 -- as a user would write it
    for text, wanted in {
        "best.pth": "../best.pth",
        "best.pth:layer4": "../best.pth:layer4",
        "bert:encoder": "../bert:encoder",
        "bert": "../bert",
        "nets.py:Net:conv1": "../nets.py:Net:conv1",
        f"{absolute}:layer4": f"{absolute}:layer4",
        "resnet50:layer4": "resnet50:layer4",
        "timm:resnet50:layer4": "timm:resnet50:layer4",
        "gone.pth:layer4": "../gone.pth:layer4",
        ":nothing": ":nothing",
    }.items():
        assert model_parts.seen_from(text, Path(), Path("work")) == wanted
        assert model_parts.seen_from(text, Path(), Path()) == text
