# Sourced by scripts/serve, scripts/test and scripts/lint: one virtual environment, .venv, in the checkout.
#
# ensure_environment NAME makes it if there is none and installs the project into it; NAME is "serve" (what the
# server needs) or "dev" (that, and what tests and linters need). A stamp in .venv remembers what was installed
# for which pyproject.toml, so that a second run calls no installer. Needs bash and Python, nothing else.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
torch_cpu_index=https://download.pytorch.org/whl/cpu
torch_cpu_pin=torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "$(basename "$0"): $*" >&2; }
fail() { say "$*"; exit 1; }

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}
has_pip() { "$python" -m pip --version >/dev/null 2>&1; }

# Prints the first Python 3.10 to 3.13 that can make a virtual environment.
find_python() {
    local candidate without_venv=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        is_supported "$candidate" || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$("$candidate" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    done
    [ -z "$without_venv" ] ||
        fail "$without_venv has no venv module; install it (on Debian and Ubuntu: apt-get install $without_venv-venv)"
    fail "no Python 3.10, 3.11, 3.12 or 3.13 found; install one, for example python3.12"
}

# grep reads to the end: with -q it could end before nvidia-smi does, which pipefail would take for no GPU.
has_nvidia_gpu() { nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; }

# Prints the version of the torch that .venv holds, or nothing.
installed_torch() {
    "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

# Prints the CUDA version that the torch in .venv was built for, or None. Reads one file, because importing torch
# takes seconds; its version does not tell, since not every CPU build is called +cpu.
torch_cuda() {
    "$python" - <<'END'
import importlib.util, pathlib, runpy
origin = importlib.util.find_spec("torch").origin
print(runpy.run_path(str(pathlib.Path(origin).with_name("version.py"))).get("cuda"))
END
}

answers() {
    "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

# Installs torch's CPU build with these pip arguments, or returns 1 if pip would bring CUDA's libraries along:
# torch's ordinary build for Linux, which several indexes offer under the same name and version, needs gigabytes.
install_cpu_torch() {
    "$python" -m pip install -qq --dry-run --report "$venv/torch.json" "$@" && "$python" - "$venv/torch.json" <<'END' &&
import json, sys
names = [item["metadata"]["name"] for item in json.load(open(sys.argv[1]))["install"]]
sys.exit(any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names))
END
        "$python" -m pip install $pip_quiet "$@"
}

install_torch() {
    local present
    present=$(installed_torch)
    if [ "$torch_build" = cuda ]; then
        if [ -n "$present" ] && [ "$(torch_cuda)" != None ]; then
            say "torch $present is there already"
            return
        fi
        say "installing torch with CUDA (an NVIDIA GPU is present); this downloads some gigabytes"
        [ -z "$present" ] || "$python" -m pip uninstall -qq -y torch
        "$python" -m pip install $pip_quiet torch || fail "torch could not be installed; pip's message is above"
        "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
            say "warning: torch $(installed_torch) cannot use this GPU, probably because its driver is too old;" \
                "the server will run on the CPU"
    elif [ -n "$present" ]; then
        say "torch $present is there already"
    elif answers "$torch_cpu_index/torch/"; then
        say "installing torch's CPU build from PyTorch's CPU index (no NVIDIA GPU found)"
        install_cpu_torch --index-url "$torch_cpu_index" torch ||
            fail "torch could not be installed from $torch_cpu_index; pip's message, if any, is above"
    else
        say "installing $torch_cpu_pin from pip's index (no NVIDIA GPU found, and PyTorch's CPU index does not answer)"
        install_cpu_torch "$torch_cpu_pin" ||
            fail "no CPU build of torch for $("$python" -V) is at hand; run again where $torch_cpu_index answers," \
                "or put a CPU build into .venv with $python -m pip install"
    fi
}

ensure_environment() {
    local name=$1 torch_build=cpu extras= pip_quiet=-qq wanted base
    ! has_nvidia_gpu || torch_build=cuda
    # A stamp holds what decides the installation: the place, the torch build, the requirements.
    wanted=$(echo "$root"; echo "$torch_build"; cat "$root/pyproject.toml")
    ! is_installed || return 0

    # The lock (on pyproject.toml, by Python: not every machine has a flock command) belongs to descriptor 9 and
    # thereby to this script; another script waits here and then finds the work done.
    base=$(find_python)
    exec 9<"$root/pyproject.toml"
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        say "waiting for another script that is installing into $venv"
        "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
    is_installed || install_environment
    exec 9<&-
}

# Whether .venv holds what NAME needs; "dev" includes "serve".
is_installed() {
    local stamp
    [ -x "$python" ] || return 1
    for stamp in "$venv/installed-$name" "$venv/installed-dev"; do
        [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ] || return 0
    done
    return 1
}

install_environment() {
    [ ! -t 2 ] || pip_quiet=
    # A virtual environment made by another tool may lack nothing but pip.
    if ! { is_supported "$python" && { has_pip || "$python" -m ensurepip >/dev/null 2>&1; }; }; then
        say "making a virtual environment in $venv ($("$base" -V))"
        "$base" -m venv --clear "$venv" || fail "$base could not make a virtual environment in $venv"
    fi
    # Python 3.10 may bring a pip that knows no --dry-run.
    "$python" -m pip install -qq 'pip>=23.1' || fail "pip could not reach its index; check the network"
    install_torch
    [ "$torch_build" = cpu ] || extras=cuda
    [ "$name" = serve ] || extras=${extras:+$extras,}dev
    say "installing turboquant-server${extras:+ [$extras]} and what it needs"
    # The constraint keeps pip from replacing the torch that was chosen above.
    echo "torch==$(installed_torch)" >"$venv/constraints.txt"
    "$python" -m pip install -qq --constraint "$venv/constraints.txt" --editable "$root${extras:+[$extras]}" ||
        fail "turboquant-server could not be installed; pip's message is above"
    echo "$wanted" >"$venv/installed-$name"
}
