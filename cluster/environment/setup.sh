#!/bin/sh
# Makes the environment for a machine without a GPU: sh cluster/environment/setup.sh FOLDER
#
# A CPU build of torch comes first, since any other order lets pip take a CUDA build of several GB. Where pip finds
# none by itself, PyTorch's own index of CPU wheels is used. Running it again does nothing unless the project's
# dependencies changed.
set -eu

venv=${1:-.venv}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"
cpu_index=https://download.pytorch.org/whl/cpu
torch_version=2.13.0

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

wanted=$(cat pyproject.toml "$here"/* | cksum)
stamp=$venv/.raylign-setup
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "$venv is up to date"
    exit 0
fi

for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "${python:-}" ] || fail "Python 3.11, 3.12 or 3.13 is needed, and none is on the PATH"

say "1/4 environment $venv with $($python --version)"
[ -x "$venv/bin/python" ] || $python -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"

is_cpu_torch() { "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null; }

if is_cpu_torch; then
    say "2/4 a CPU build of torch is already there"
elif $pip download --no-deps --only-binary=:all: --dest "$venv/.wheels" "torch==$torch_version+cpu" 2>/dev/null; then
    say "2/4 torch $torch_version+cpu, as pip finds it"
    $pip install "$venv"/.wheels/torch-*.whl
else
    say "2/4 torch $torch_version from PyTorch's index of CPU wheels"
    $pip install "torch==$torch_version" torchvision --index-url $cpu_index
fi
rm -rf "$venv/.wheels"

say "3/4 raylign with vLLM for CPUs, Ray, DeepSpeed and the test tools (some minutes the first time)"
$pip install --editable ".[cpu,test]"
# vLLM names these as audio and video helpers; their wheels are CUDA builds that cannot load here, and nothing uses them.
$pip uninstall --yes torchaudio torchcodec

say "4/4 checking the imports"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
    say "    torchvision is a CUDA build; a small import hook lets its Python half load"
    cp "$here/raylign_torchvision.py" "$site/"
    echo 'import raylign_torchvision' >"$site/raylign_torchvision.pth"
fi
"$venv/bin/python" -c 'import torchvision, transformers, vllm, deepspeed, ray, peft' >"$venv/setup.log" 2>&1 ||
    fail "an import fails; see $venv/setup.log"
echo "$wanted" >"$stamp"
say "done: $venv/bin/raylign --help"
