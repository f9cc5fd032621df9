"""The parsers of expressions, selectors, references and edits as functions of bytes, and edits that are carried out.

Bytes are decoded as on a command line: invalid UTF-8 becomes lone surrogates.
"""

from __future__ import annotations

import random
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from modelcli import edits, model_parts, resolve
from modelcli.edits import registry
from modelcli.language import expressions, references, selectors
from modelcli.live import memory, surgery
from modelcli.live.describe import describe
from modelcli.live.inputs import Inputs
from modelcli.live.meta_models import meta_copy, seeded
from modelcli.live.sources import is_lazy, named_tensors, real_tensor
from modelcli.model.blueprint import Blueprint
from tests.fuzz import limits
from tests.fuzz.target import Target

#: The grammar of each language: `<rule>` stands for one of the rule's texts. The first text ends the recursion.
GRAMMAR: Mapping[str, Sequence[str]] = {
    # expressions
    "call": ["ReLU()", "<class>", "<class>(<args>)", "<class>(<args>,<key>=<value>)", "<class>( <args> )", "<layer>"],
    "layer": [
        "Linear(<hole>,<size>)",
        "Linear(<hole>,<size>,bias=<value>)",
        "Conv2d(<hole>,<size>,(<size>,<size>),padding_mode='<word>')",
        "BatchNorm1d(<hole>)",
        "Sequential(<call>,<call>)",
        "ModuleList([<call>,<call>])",
        "ModuleDict({<text>:<call>})",
        "LSTM(<size>,<size>,<size>)",
        "TransformerEncoder(<call>,<size>)",
        "Embedding(<size>,<size>,padding_idx=<number>)",
        "Linear(4,4,device=<text>,dtype=<dtype>)",
    ],
    "hole": ["4", "_", "<size>", "<number>"],
    "size": ["2", "1", "3", "4", "8", "0", "-1", "10**<digit>", "<number>"],
    "class": [
        "Linear", "Conv2d", "ReLU", "Sequential", "BatchNorm1d", "LayerNorm", "GRU", "Identity", "Module", "Bilinear",
        "torch.nn.Linear", "nn.Dropout", "torchvision.ops.MLP", "canary:Class", "canary.below:Class", "canary.Class",
        "os.path:join", "antigravity:x", "builtins:eval", "__import__", "Ｌｉｎｅａｒ", "<word>", "<word>.<word>",
    ],
    "args": ["", "<value>", "<value>,<value>", "<value>,<args>", "*<args>", "**<value>"],
    "value": [
        "1", "_", "None", "True", "<number>", "<number>", "<text>", "<dtype>", "<class>", "<call>", "<call>",
        "[<args>]", "(<args>,)", "{<text>:<value>}", "{<value>:<value>,**<value>}", "-<value>", "(<value>)",
        "<value><operator><value>", "<code>",
    ],
    "key": ["bias", "in_features", "num_layers", "device", "dtype", "inplace", "class", "<word>"],
    "number": [
        "0", "1", "7", "-1", "0.5", "1e9", "1e-400", "1e999", "2**62", "2**63", "9**9**9", "10**10", "0x7f", "1_000",
        "<digit><number>", "9223372036854775807", "9223372036854775808", "１２", "1j",
    ],
    "digit": ["1", "2", "3", "5", "9"],
    "operator": ["+", "-", "*", "/", "//", "%", "**", "@", "<<", "|", ".", ":", " if 1 else ", " and "],
    "text": [
        "'a'", "''", "'<word>'", '"<word>"', "'it\\'s'", "'\\ud800'", "'\\N{DASH}'", "r'\\'", "b'a'", "f'{<value>}'",
    ],
    "dtype": ["torch.float16", "torch.int8", "torch.float8_e5m2", "torch.complex64", "float32", "bfloat16", "torch.os"],
    "code": [
        "__import__('canary')", "open('made','w')", "().__class__", "lambda: 0", "[i for i in 1]", "(x:=1)", "a[0]",
        "__colon__", "nn.__dict__", "exec('import canary')", "...", "# it's\n", "'''it's''', canary:Class",
    ],
    "word": [
        "a", "zeros", "reflect", "meta", "cpu", "weight", "0", "é", "模", " ", "\ud800", "\udcff", "\0", "\x1b[1m",
        "-x",
    ],
    # selectors
    "selector": [
        ".", "<component>", "<component>.<selector>", "<component>.<selector>", "<component>:<class>", "**:<class>",
        "**", "<name>", "<name>", "",
    ],
    "component": [
        "0", "*", "**", "?", "-1", "-<digit>", "[0-3]", "[<number>-<number>]", "[0,2-3]", "{<piece>,<piece>}", "bn?",
        "<name>", "<piece><piece>", "{{{{{{{{{{{a}}}}}}}}}}}", "[", "]", "{", "}", "\\<piece>", "<word>",
    ],
    "piece": ["a", "*", "?", "b", "1", "\\*", "<component>", "<word>", "", "."],
    "name": [
        "0", "0.weight", "bn", "bn.running_mean", "blocks", "blocks.0", "blocks.0.lin.bias", "heads.a b", "heads.-1",
        ".",
    ],
    # references
    "reference": [
        "alexnet", "<call>", "<call>", "<file>", "<file>:<word>", "<file>:<call>", "canary:<word>",
        "canary.below:<call>",
        "os:system", "C:\\<file>", "<word>/<word>", "<file>.py:<file>.py:<call>", "bert-base-uncased", "./<file>", "~",
    ],
    "file": [
        "nets.py", "canary.py", "best.pth", "a.safetensors", "folder/", "../nets.py", "/dev/null", "<word>.py",
        "<word>",
    ],
    # edits
    "edit": [
        "freeze 0", "replace <at> <call>", "replace <at> <quoted> <options>", "replace <options> -- <at> <quoted>",
        "replace <at> Linear <number> <number> bias=<word>", "add <at>.<word> <quoted>", "add <at> <quoted>",
        "insert blocks.<digit> <quoted>", "insert <at> <quoted> --renumber", "append <at> <quoted>",
        "insert <at> <call> --after", "append blocks <call>",
        "resize <at> vocab_size=<digit>", "resize . image_size=<number>",
        "remove <at> <at>", "remove <at> <options>", "extract <at>", "rename <at> <at>", "rename <at>.** **",
        "freeze <at> <options>", "unfreeze <at> <at>", "init <at> <scheme>", "init <at> <scheme> --bias <scheme>",
        "cast <at> <dtype>", "cast <at> half <options>",
        "dequantize <at> <dtype>", "dequantize <at> half --block <digit>,<number> <options>",
        "set <at> <key>=<value> <options>", "set <at> <key>=<call>",
        "slice <at> <digit>-<digit>,<digit> --tied",
        "split <at> <at> <at> --dim <number>", "split <at> <at> <at> --sizes <digit>,<digit>", "concat <at> <at> <at>",
        "permute <at> <digit>,<digit> <options>", "stack <at> <at> --dim <number>", "unstack <at> <at>",
        "reshape <at> <digit>,-1 <options>",
        "tie <at> <at>", "untie <at>", "fuse <at> --into <at> <options>",
        "graft <at> <reference>:<at>", "graft <at> <call> --rename '<at> <at>' --also-init",
        "wrap <at> 'Sequential(_,<layer>)' <options>", "wrap <at> <quoted> --also <at>", "<word> <at>", "frezee <at>",
    ],
    "operation": [
        "freeze 0", "<edit>", "<edit>", "replace 0 <quoted>", "replace blocks.1 <quoted> --untie --keep-weights",
        "replace '**:Linear' '<layer>' --untie", "add heads.new '<layer>'", "insert blocks.<digit> '<layer>'",
        "append blocks '<layer>'", "init . <scheme> --bias <scheme>", "init '**:Linear' <scheme>", "cast . <dtype>",
        "resize 0 vocab_size=<digit>", "set <at> <key>=<value>", "set '**:BatchNorm1d' eps=<number>",
        "set . heads=None",
        "slice blocks <digit>-<digit>,<digit>", "slice <name> -1,0", "tie <name> <name>", "untie <name>",
        "fuse .", "fuse <name> --into <at>",
        "graft <name> '<layer>' --no-strict",
        "split <name>.weight <name>.q <name>.k --dim <digit>", "concat 0.weight <name>.weight <name>.both",
        "wrap <at> 'Sequential(_,<layer>)'", "wrap '**:Linear' 'Sequential(_,Dropout(0.5))'",
        "dequantize . <dtype> --block <digit>,<digit>",
        "permute <name> 1,0", "stack blocks.*.<word> blocks.all", "unstack <name> <name>.*", "reshape <name> 2,-1",
        "remove blocks.<digit>", "extract <name>", "freeze <name> --except <at>", "unfreeze <component>",
    ],
    "at": ["0", "<name>", "<name>", "<selector>", "'<selector>'", '"<selector>"', "<component>", "-1", "**:Linear"],
    "quoted": ["'<call>'", '"<call>"', "<call>", "<class> <value> <key>=<value>", "'<layer>'", '"<layer>"'],
    "options": [
        "", "--except <at>", "--except=<at>", "--expect <digit>", "--expect=<word>", "--keep-weights", "--untie",
        "--tie", "--<word>", "-<word>", "--expect", "--", "<options> <options>",
        "--keep-weights=repeat", "--keep-weights=interpolate",
    ],
    "scheme": [
        "zeros", "default", "xavier_uniform", "normal", "'normal(0,<number>)'", "'constant(<value>)'", "dirac",
        "sparse",
        "'sparse(<number>)'", "'trunc_normal(0,<number>,<number>,<number>)'", "torch.nn.init.ones_", "'<call>'",
        "<word>",
        "eye", "orthogonal", "'kaiming_normal(mode=<text>)'", "'uniform(<args>)'", "'dirac(groups=<number>)'",
    ],
}  # fmt: skip
_RULE = re.compile(r"<(\w+)>")


def grown(draw: random.Random, rule: str, depth: int = 8) -> str:
    """Return a random text of a rule."""
    text = draw.choice(GRAMMAR[rule]) if depth else GRAMMAR[rule][0]
    return _RULE.sub(lambda match: grown(draw, match[1], max(depth - 1, 0)), text)


def _grammar(rule: str) -> Callable[[random.Random], bytes]:
    """Return a generator of texts of a rule. Some have an insertion, and some are nested in themselves many times."""

    def made(draw: random.Random) -> bytes:
        text = grown(draw, rule)
        match draw.randrange(20):
            case 0:
                at = draw.randrange(len(text) + 1)
                text = text[:at] + draw.choice(_MARKS) + text[at:]
            case 1:
                before, after = draw.choice((("(", ")"), ("[", "]"), ("M(", ")"), ("{", "}"), ("-", ""), ("M(x=", ")")))
                times = draw.choice((1, 2, 10, 49, 51, 200))
                text = before * times + text + after * times
            case 2:
                text = text * draw.choice((2, 3, 50))
        return _bytes(text)

    return made


_MARKS = [
    "'", '"', "\\", "(", ")", "[", "]", "{", "}", ",", ".", ":", "=", "_", "-", "--", "*", "**", "?", "#", "\n",
    "\r", "\t",
    " ", "\0", "\x1b", "\u2028", "é", "Ａ", "\ud800", "\udcff", "'''", "__", "\\\n", "\ufeff", "$(true)", "`", ";", "~",
]  # fmt: skip


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


#: Expressions that exceed a limit: depth, numbers, characters, memory, time.
NASTY = [
    "Linear(10**10,10**10)",
    "Linear(10**5,10**6)",
    "Embedding(2**62,1)",
    "Linear(9**9**9,1)",
    "Linear(9**9**9**9,1)",
    "Linear(2**-1*2**10000,1)",
    f"Linear({'9' * 60_000},1)",
    "[" * 100_000,
    "(" * 60_000,
    "[" * 30_000 + "]" * 30_000,
    "ReLU(" * 10_000 + ")" * 10_000,
    "Sequential(" * 5_000 + ")" * 5_000,
    "-" * 60_000 + "1",
    "1" + "+1" * 30_000,
    "a" + ".b" * 30_000,
    "a:" * 30_000,
    "'" + "\\'" * 30_000,
    '"' + '\\"' * 30_000,
    "Sequential('" + "'" * 60_000,
    "{a," * 20_000,
    "*?" * 2_000,
    "Ｌｉｎｅａｒ(4,4)",
    "Linear(４,4)",
    "\ud800",
    "Linear('\udcff')",
    "LSTM(1,1,10**9)",
    "LSTM(1,1,num_layers=10**9)",
    "TransformerEncoder(ReLU(),10**9)",
    "TransformerEncoder(TransformerEncoder(TransformerEncoder(ReLU(),10**4),10**4),10**4)",
    "Transformer(8,2,10**9,10**9)",
    "Sequential(Linear(10**5,10**5),Linear(1,1,device='nowhere'))",
    "Sequential(Linear(10**5,10**5),Conv2d(1,1,1,padding_mode='meta'))",
    "Linear(4,4,device='meta')",
    "Linear(4,4,True,'meta')",
    "canary:Class(1)",
    "Linear(__import__('canary'))",
]


def _with_canary(folder: Path) -> None:
    """Create Python files that must not run; each would leave a trace."""
    for name in ("canary.py", "nets.py"):
        (folder / name).write_text(f"import os\nos.system('true')\nclass Class:\n    {name[0]} = 1\n", encoding="ascii")


def network() -> nn.Sequential:
    """Return a small model with the names of the grammar: numbered, nested, shared, tied and unusual ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.add_module("bn", nn.BatchNorm1d(4))
    model.add_module("blocks", nn.Sequential(nn.Sequential(), nn.Linear(4, 4), nn.ReLU(), model[1]))
    model.blocks[0].add_module("lin", nn.Linear(4, 4))
    model.blocks[0].lin.weight = model.blocks[1].weight
    model.add_module("heads", nn.ModuleDict({"a b": nn.Linear(4, 2), "-1": nn.Embedding(3, 4), "é": nn.Identity()}))
    return model


def every(folder: Path) -> list[Target]:
    """Return all languages. File names are relative to `folder`."""
    _with_canary(folder)
    surgeon = Surgeon()
    blueprint = describe(surgeon.model)

    def reference(data: bytes) -> object:
        found = resolve.parse(_text(data), folder)
        assert not isinstance(found, references.NamedModel) or resolve.parse(str(found), folder) == found
        return found

    def part(data: bytes) -> object:
        name, path = model_parts.split(_text(data), folder)
        assert _text(data) in (name, f"{name}:{path}")
        return name, path

    words = [_bytes(mark) for mark in _MARKS]
    nasty = [_bytes(text) for text in NASTY]
    of_expressions = words + _words("number", "code", "text", "dtype", "class", "operator")
    of_edits = words + _words("edit", "options", "at", "class", "scheme")
    as_edits = [_bytes(f"replace 0 {word}") for text in NASTY for word in (text, shlex.quote(text))]
    of_paths = [_bytes(text) for text in (".py:" * 16_000, "a/" * 16_000 + ".py:" * 16_000, "/" * 60_000, "\0.py:Net")]
    many = [b"freeze " + b"a " * 30_000, b"freeze a " + b"--except a " * 30_000, b"freeze '" + b"a" * 500_000]
    list(registry.usable())  # the modules of edits are imported when they are needed: not while an input is watched
    parsers = [
        Target("expressions", _expression, _EXPRESSIONS, of_expressions, _grammar("call"), nasty),
        Target("selectors", partial(_selector, blueprint), _SELECTORS, words, _grammar("selector"), nasty),
        Target("renaming", partial(_renaming, blueprint), _RENAMINGS, words, _pairs, nasty),
        Target("references", reference, _REFERENCES, of_expressions, _grammar("reference"), nasty + of_paths),
        Target("parts of references", part, _PARTS, of_expressions, _parts, nasty + of_paths),
        Target("edits", _edit, _EDITS, of_edits, _grammar("edit"), [*as_edits, *many]),
    ]
    carried_out = Target("surgery", surgeon, _EDITS, of_edits, _grammar("operation"), as_edits, 100, limits.RUNNING)
    return [*(replace(parser, forbidden=limits.EVALUATING) for parser in parsers), carried_out]


def _words(*rules: str) -> list[bytes]:
    return [_bytes(text) for rule in rules for text in GRAMMAR[rule] if "<" not in text]


_EXPRESSIONS = [
    b"Linear(4096,10)",
    b"Conv2d(_,64,kernel_size=(3,3),padding_mode='reflect',dtype=torch.float16)",
    b"Sequential(Linear(256*6*6,10),torch.nn.ReLU(inplace=True),nets.layers:Own({'a':[1,2]},LayerNorm))",
    "M('é \\' \\\\ \"',-1.5e-3,(1,),[],{1:None})".encode(),
]
_SELECTORS = [
    b"blocks.*",
    b"**:Linear",
    b"blocks.[0-3]",
    b"{bn,blocks}.**",
    b"blocks.-1",
    b"heads.a\\ b",
    b".",
    b"**.?n*:_*",
]
_RENAMINGS = [
    b"blocks.** body.**",
    b"**.weight **.w",
    b"*.running_* *.r_*",
    b"blocks.[0-3].* blocks.[0-3].*x",
    b"{0,bn}.* {0,bn}.*",
]
_REFERENCES = [
    b"alexnet",
    b"resnet18(num_classes=10)",
    b"nets.py:Net(3,2)",
    b"package.module:build(depth=3)",
    b"canary.py:Class",
]
_PARTS = [
    b"resnet50:layer4",
    b"timm:resnet50:layer4.0",
    b"nets.py:Net(3,2):body",
    b"package.module:build(path='a:b'):body",
    b"C:\\models\\best.pth:backbone",
    b"canary.py:Class:",
]
_EDITS = [
    b"replace 0 Linear(_,4)",
    b"replace '**:Linear' 'Linear(4, 4, bias=False)' --keep-weights --untie --except heads.**",
    b"replace blocks.2 PReLU 4 init=0.5 --expect 1",
    b"add heads.new Linear(4,2)",
    b"insert blocks.1 'BatchNorm1d(4)'",
    b"append blocks Softmax(dim=1)",
    b"resize 0 vocab_size=9",
    b"remove blocks.2",
    b"extract blocks",
    b"rename bn.** norm.**",
    b"freeze . --except bn",
    b"unfreeze 'heads.a b'",
    b"init '**:Linear' 'normal(0,0.01)' --bias 'constant(0.5)'",
    b"init . default",
    b"cast . bfloat16 --except=bn",
    b"dequantize '**.experts' . bfloat16 --except=bn --block 128,64",
    b"slice blocks 2,0-1 --tied",
    b"tie 0.weight blocks.0.weight",
    b"untie 0.weight",
    b"fuse '**:BatchNorm1d' --except bn",
    b"graft blocks canary.py:Class:blocks --rename '**.w **.weight' --no-strict",
    b"split '**.qkv.*' '**.q.*' '**.k.*' --dim -1 --sizes 4,4",
    b"concat 0.weight blocks.0.weight both.weight --dim 1",
    b"wrap '**:Linear' 'Sequential(_,Dropout(0.5))' --expect 3",
    b"stack '**.experts.*.w1' '**.experts.w1' --dim -1",
    b"unstack '**.experts.w1' '**.experts.[0-7].w1'",
    b"permute '**.c_proj.weight' 1,0 --except=bn",
    b"reshape '**.qkv.weight' 3,-1,4 --expect 1",
    b"set '**:BatchNorm1d' momentum=0.5 eps=1e-3 --expect 1",
]


def _expression(data: bytes) -> object:
    """Parse an expression, and require that its text parses to the same."""
    call = expressions.parse(_text(data))
    assert repr(expressions.parse(str(call))) == repr(call)
    return call


def _selector(blueprint: Blueprint, data: bytes) -> object:
    selector = selectors.parse(_text(data))
    found = selectors.matched_modules(selector, blueprint), selectors.matched_tensors(selector, blueprint)
    return found, selectors.select_tensors(blueprint, [selector.text], without=["bn.weight"])


def _renaming(blueprint: Blueprint, data: bytes) -> object:
    old, _, new = _text(data).partition(" ")
    renamed = selectors.renaming(old, new, blueprint)
    return {name: renamed(name) for name in blueprint.by_name}


def _pairs(draw: random.Random) -> bytes:
    """Return two selectors, often with the same wildcards."""
    old = grown(draw, "selector")
    new = grown(draw, "selector") if draw.randrange(3) == 0 else old.replace("b", draw.choice(("", "x", "*", "b.b")))
    return _bytes(f"{old} {new}")


def _parts(draw: random.Random) -> bytes:
    """Return a reference and a path behind a colon."""
    return _bytes(f"{grown(draw, 'reference')}:{grown(draw, 'selector')}")


def _edit(data: bytes) -> object:
    """Parse an edit, and require that its line parses to the same."""
    edit = edits.parse(_text(data))
    assert repr(edits.parse(str(edit))) == repr(edit)
    return edit


class Surgeon:
    """Carries an edit out on a small model on the meta device, and draws its new values if they are few."""

    def __init__(self) -> None:
        with seeded(0):
            self.model = network()
        self(b"init . default")  # torch imports some modules at its first use

    def __call__(self, data: bytes) -> object:
        edit = edits.parse(_text(data))
        model = meta_copy(self.model, keep_values=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about sizes and classes
            done = surgery.apply(model, [edit], inputs=Inputs(((2, 4),)), trusted=False)
            describe(done.model)
            for change in done.changes:
                for line in change.resolved:
                    edits.parse(line)
            if memory.bytes_of(done.model) < 1_000_000:
                for tensor in named_tensors(done.model).values():
                    assert is_lazy(tensor) or real_tensor(tensor).shape == tensor.shape
        return done
