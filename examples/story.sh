#!/bin/sh
# The story of the README: each command is shown before its output. Runs in a folder of its own.
set -eu
export TORCH_HOME="${TORCH_HOME:-$PWD/.torch}"
nets="$(cd "$(dirname "$0")" && pwd)/nets.py"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$nets" "$folder/nets.py"
cd "$folder"

show() {
    printf '\n$ %s\n' "$*"
    sh -c "$*"
}

show "cat nets.py"
show "modelcli summary nets.py:Net --input-size 1,1,1,1"
show "modelcli params nets.py:Net --values"
show "modelcli params 'nets.py:MyLinear(3,2)'"
show "modelcli summary alexnet"
show "modelcli modules alexnet"
show "modelcli modules alexnet -s classifier"
show "modelcli modules alexnet -s classifier.0"
show "modelcli modules alexnet --repr"
show "modelcli load alexnet"
show "modelcli replace classifier.6 'Linear(4096,10)'"
show "modelcli freeze features"
show "modelcli summary"
show "modelcli save runs/best.pth"
show "modelcli params runs/best.pth --frozen"
if python -c 'import torchvision' 2>/dev/null; then
    show "python -c 'import torch, torchvision.models
torchvision.models.alexnet(num_classes=10).load_state_dict(torch.load(\"runs/best.pth\", weights_only=True))
print(\"plain PyTorch loads it\")'"
else
    printf '\n# Plain torchvision cannot be imported here: its compiled operators are not those of this torch.\n'
fi
show "python -c 'import modelcli
model = modelcli.load(\"runs/best.pth\")
print(sum(not p.requires_grad for p in model.parameters()), \"parameters are frozen\")'"
show "modelcli replace classifier.6 'Linear(_,10)' -m alexnet -o head10.pth"
printf '\n# The record left aside, and another number of classes: refused, and nothing is changed.'
show "modelcli load runs/best.pth --arch alexnet || echo \"exit code \$?\""
