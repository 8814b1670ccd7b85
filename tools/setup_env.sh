#!/usr/bin/env bash
# Make the virtual environment that everything here runs in, `bov` included, and keep it up to date.
#
#   tools/setup_env.sh                    create or update .venv; returns at once when nothing changed
#   tools/setup_env.sh --transformers5    also .venv/transformers5: transformers 5, on which exports are tested too
#   tools/setup_env.sh --help
#
# PYTHON=/path/to/python3.12   which Python to build it from (3.11 or 3.12); only read when the venv is made
# BOV_VENV=/path/to/venv       where it lives (default: .venv beside the Makefile)
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, ...) apply as usual.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${BOV_VENV:-$root/.venv}
requirements=("$root/requirements.txt" "$root/requirements-dev.txt")
pyproject=$root/pyproject.toml
compat=$root/bov_megatron/compat.py
stamp=$venv/.requirements.sum
transformers5=$venv/transformers5
transformers5_requirements=$root/tests/exchange/requirements-transformers5.txt

die() {
    printf 'setup_env: %s\n' "$*" >&2
    exit 1
}

# Print nothing if interpreter $1 can build the environment, else the reason why not. A name that is found says
# little (pyenv's shims exist for versions that don't run; Debian ships Python without ensurepip): it must run.
why_unfit() {
    local answer
    command -v "$1" >/dev/null 2>&1 || { echo "not found" && return; }
    if ! answer=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        echo "found, but does not run"
        return
    fi
    case $answer in
        3.11 | 3.12) ;;
        *) echo "is Python $answer" && return ;;
    esac
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        echo "is Python $answer without its venv module (on Debian and Ubuntu: apt-get install python$answer-venv)"
}

# Set `python` to the interpreter to use. An explicit PYTHON is obeyed or refused, never replaced silently.
choose_python() {
    local candidate reason reasons=""
    local candidates=(python3.11 python3.12 python3 python) # 3.11 first: the one the measurements were made with
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        reason=$(why_unfit "$candidate")
        if [[ -z $reason ]]; then
            python=$candidate
            return
        fi
        reasons+=$'\n'"  $candidate: $reason"
    done
    die "Python 3.11 or 3.12 with venv is needed. Tried:$reasons"$'\n'"Install one, or name it: make env PYTHON=/path/to/python3.11"
}

# What the environment was made from. Contents, not times: a fresh checkout has new times for old files.
fingerprint() {
    cat "${requirements[@]}" "$pyproject" "$compat" | cksum
}

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        die "pip failed (above). The next call tries again; docs/use/setup.md has a section on machines without network"
}

# A CPU build of torch beside torchvision's CUDA build: the latter fails to import, and with it every model class of
# transformers. Let this environment's Python mend that at start (see bov_megatron/compat.py).
mend_torchvision() {
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    rm -f "$site"/bov_megatron_compat.{py,pth}
    if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
        cp "$compat" "$site/bov_megatron_compat.py"
        echo 'import bov_megatron_compat; bov_megatron_compat.install_torchvision_fix()' >"$site/bov_megatron_compat.pth"
    fi
}

make_environment() {
    local file
    for file in "${requirements[@]}" "$pyproject"; do
        [[ -f $file ]] || die "$file is missing: is this a whole checkout?"
    done

    local works=no
    if "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        works=yes # false too for a venv whose Python was removed or that was copied from elsewhere
    fi
    if [[ $works == yes && -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
        return
    fi

    if [[ $works == no ]]; then
        choose_python
        echo "setup_env: making $venv from $python ($("$python" --version 2>&1))"
        "$python" -m venv --clear "$venv"
    fi
    echo "setup_env: installing requirements into $venv (the first time: a few minutes, about 2.6 GB)"
    rm -f "$stamp"
    local arguments=()
    for file in "${requirements[@]}"; do
        arguments+=(-r "$file")
    done
    install "${arguments[@]}"
    install --no-deps --no-build-isolation --editable "$root" # needs setuptools, which the requirements bring
    mend_torchvision
    fingerprint >"$stamp" # last, so that an interrupted installation is not taken for a whole one
    echo "setup_env: done, $("$venv/bin/python" --version) in $venv"
}

# A folder beside site-packages, seen only by a Python that has it in PYTHONPATH; torch and the rest come from the
# environment. The copy of the requirements, written last, says that it is whole and what it holds.
make_transformers5() {
    if cmp -s "$transformers5_requirements" "$transformers5/requirements.txt"; then
        return
    fi
    echo "setup_env: installing transformers 5 into $transformers5 (130 MB)"
    rm -rf "$transformers5"
    install --no-deps --target "$transformers5" -r "$transformers5_requirements"
    cp "$transformers5_requirements" "$transformers5/requirements.txt"
}

main() {
    case ${1:-} in
        "") make_environment ;;
        --transformers5)
            make_environment
            make_transformers5
            ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) die "unknown argument '$1' (see --help)" ;;
    esac
}

main "$@"
