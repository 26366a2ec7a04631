#!/bin/sh
# Installs SMR on this machine: the Python package, a CRIU that is new enough, and the runtime's registration with the engines.
# Prints every change it makes. A second run changes nothing. A run that fails, or is interrupted, takes back what it did.
set -eu
umask 022
export LC_ALL=C

usage() {
    cat <<'TEXT'
usage: install.sh [OPTION...]           install, or bring an installation up to these options
       install.sh --uninstall [--purge] take everything away again (the image store only with --purge)
       install.sh --criu-only --prefix DIR   only a private CRIU, in DIR/criu
       install.sh --make-bundle FILE    pack what a node without a network needs; install there with --bundle FILE (FOLDER/ is
                                        not packed)

  --dry-run             say what would be done and change nothing
  --prefix DIR          where SMR lives (default /opt/smr)
  --engines LIST        auto (default: those found), none, or some of podman,containerd,crio
  --default-runtime     make smr the engines' default runtime, so that an annotation alone is enough (--no-default-runtime
                        takes that back)
  --criu PATH           a CRIU of 4.1 or newer (default: the machine's when it is new enough and works, else a private one of
                        Debian's packages)
  --runtime PATH        the real OCI runtime (default: runc, else crun)
  --python PATH         Python 3.11 to 3.13 with venv (default: found on PATH); also 3.12 for python3.12
  --source DIR|WHEEL    the package to install (default: the folder of install.sh)
  --wheels DIR          take all Python packages from DIR and none from the network
  --bundle FILE         take everything from a bundle and nothing from the network (its folder, when it is unpacked already)
  --cache DIR           keep and reuse downloads there
  --mirror ADDRESS      Debian archive for CRIU (default: those of the machine's apt sources)
  --setting NAME=VALUE  a line of /etc/smr/smr.toml (repeat it; NAME= takes it back)
  --containerd-config FILE  (default /etc/containerd/config.toml)
  --restart             restart an engine whose configuration changed (default: only say how)
  --force               uninstall though containers run that need SMR
  --root DIR            put everything outside the prefix below DIR (for building images, and for tests)

For --make-bundle: --python 3.12 for the nodes' Python (repeat it; default 3.11, 3.12 and 3.13), --prefix DIR for the nodes' prefix,
--with-runc to add a runc for nodes that have neither runc nor crun, --with-python to add a Python and a shell of our own (then --python
is needed only for nodes that use theirs all the same); --source, --wheels, --cache and --mirror as above.

--default-runtime, --engines, --criu, --runtime, --setting and --containerd-config hold for later runs too, until given again (--criu and
--runtime also take auto).
TEXT
}

HERE=$(cd "$(dirname "$0")" && pwd)
PREFIX=/opt/smr ROOT='' DRY='' MIRROR='' CACHE='' SOURCE=$HERE WHEELS='' PYTHON='' BUNDLE='' PYTHONS='' with_runc='' with_python='' source_name='' bundle_folder=''
verb=install purge='' force='' restart='' engines='' criu='' runtime='' default_runtime='' containerd_config='' settings=''

die_usage() {
    printf 'install.sh: %s\n' "$*" >&2
    usage >&2
    exit 2
}
absolute() { case $1 in auto) echo auto ;; /*) printf '%s\n' "${1%/}" ;; *) printf '%s\n' "$PWD/${1%/}" ;; esac; }

while [ $# -gt 0 ]; do
    option=$1
    case $option in
        --*=*) value=${option#*=} option=${option%%=*} ;;
        --prefix | --engines | --criu | --runtime | --python | --source | --wheels | --cache | --mirror | --containerd-config | --root | \
            --bundle | --make-bundle | --setting)
            [ $# -gt 1 ] || die_usage "$option needs a value"
            shift
            value=$1
            ;;
        *) value='' ;;
    esac
    case $option in
        --help | -h)
            usage
            exit 0
            ;;
        --dry-run) DRY=1 ;;
        --uninstall) verb=uninstall ;;
        --criu-only) verb=criu_only ;;
        --make-bundle)
            verb=make_bundle bundle_file=$(absolute "$value")
            case $value in */) bundle_folder=1 ;; esac
            ;;
        --bundle) BUNDLE=$(absolute "$value") ;;
        --with-runc) with_runc=1 ;;
        --with-python) with_python=1 ;;
        --purge) purge=1 ;;
        --force) force=1 ;;
        --restart) restart=1 ;;
        --default-runtime) default_runtime=yes ;;
        --no-default-runtime) default_runtime=no ;;
        --prefix) PREFIX=$(absolute "$value") ;;
        --root) ROOT=$(absolute "$value") ;;
        --criu) criu=$(absolute "$value") ;;
        --runtime) runtime=$(absolute "$value") ;;
        --python)
            case $value in
                3.[0-9] | 3.[0-9][0-9]) PYTHONS="$PYTHONS $value" PYTHON=python$value ;;
                *) PYTHON=$value ;;
            esac
            ;;
        --source) SOURCE=$(absolute "$value") ;;
        --wheels) WHEELS=$(absolute "$value") ;;
        --cache) CACHE=$(absolute "$value") ;;
        --mirror) MIRROR=$value ;;
        --engines) engines=$value ;;
        --setting)
            case $value in
                *[[:space:]]*) die_usage "--setting: '$value' has a blank in it" ;;
                [a-z]*=*) settings="$settings $value" ;;
                *) die_usage "--setting: '$value' is not NAME=VALUE" ;;
            esac
            ;;
        --containerd-config) containerd_config=$(absolute "$value") ;;
        *) die_usage "unknown option $option" ;;
    esac
    shift
done
case $PREFIX in '' | *[[:space:]]*) die_usage "--prefix cannot be / or hold spaces" ;; esac
for name in $(printf '%s' "$engines" | tr ',' ' '); do
    case $name in auto | none | podman | containerd | crio) ;; *) die_usage "--engines: '$name' is none of auto, none, podman, containerd, crio" ;; esac
done

TMP=$(mktemp -d "${TMPDIR:-/tmp}/smr-install.XXXXXX")
export TMPDIR="$TMP" # what pip and others leave when they are killed goes with it
# shellcheck source=deploy/transaction.sh
. "$HERE/deploy/transaction.sh"
# shellcheck source=deploy/criu.sh
. "$HERE/deploy/criu.sh"
# shellcheck source=deploy/bundle.sh
. "$HERE/deploy/bundle.sh"
# shellcheck source=deploy/python.sh
. "$HERE/deploy/python.sh"

child=''
# shellcheck disable=SC2329  # called by the trap
at_exit() {
    status=$?
    trap '' EXIT HUP INT TERM
    set +e
    # with all that it started; what they leave lies in TMP or STATE
    [ -z "$child" ] || { kill -KILL -- "-$child" && wait "$child"; } 2>/dev/null
    if [ -n "$running" ]; then
        [ "$changes" = 0 ] || say "undoing what this run did"
        undo
    fi
    rm -rf "$TMP"
    exit "$status"
}
trap at_exit EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

quietly() { # COMMAND...: output only when it fails; a signal ends it at once
    setsid "$@" >"$TMP/log" 2>&1 </dev/null &
    child=$!
    if wait "$child"; then
        child=''
    else
        child=''
        cat "$TMP/log" >&2
        fail "failed: $*"
    fi
}

register() { # VERB ARGUMENT...: smr.shim.register from the source, or as installed when the source is not there
    if [ -n "$own_python" ]; then
        "$PYTHON" -I -B -m smr.shim.register "$@"
    elif { [ -f "$SOURCE" ] || [ -d "$SOURCE/shim" ]; } && [ -n "$PYTHON" ]; then
        unpacked_source
        PYTHONPATH=$TMP/path PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 "$PYTHON" -s -m smr.shim.register "$@"
    else
        "$PREFIX/venv/bin/python" -I -B -m smr.shim.register "$@"
    fi
}

unpacked_source() { # in TMP/path, as Python imports it
    [ ! -d "$TMP/path" ] || return 0
    mkdir -p "$TMP/path/smr"
    if [ -d "$SOURCE" ]; then
        for part in proto images shim hooks; do ln -s "$SOURCE/$part" "$TMP/path/smr/$part"; done
    else
        "$PYTHON" -I -m zipfile -e "$SOURCE" "$TMP/path"
    fi
}

own_python='' # set when PYTHON is the bundle's, the package in it

find_python() { # needed|if-there: sets PYTHON
    if [ -z "$PYTHON" ] && [ -d "${BUNDLE:-/nowhere}/python" ]; then
        own_python=1
        bundled_python
        return 0
    fi
    # shellcheck disable=SC2086
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        found=$("$name" -I -c 'import sys, ensurepip, venv; assert (3, 11) <= sys.version_info < (3, 14); print(sys.executable)' 2>/dev/null) || continue
        PYTHON=$found
        return 0
    done
    [ "$1" = needed ] || return 0
    fail "Python 3.11 to 3.13 with its venv module is needed${PYTHON:+, and $PYTHON is not that}: apt-get install python3 python3-venv, or give --python PATH"
}

# What the last run was asked for holds, where this one says nothing.
remembered() { [ ! -f "$STATE/options" ] || sed -n "s/^$1=//p" "$STATE/options"; }

settle_options() {
    : "${engines:=$(remembered engines)}" "${criu:=$(remembered criu)}" "${runtime:=$(remembered runtime)}"
    : "${default_runtime:=$(remembered default_runtime)}" "${containerd_config:=$(remembered containerd_config)}"
    : "${engines:=auto}" "${criu:=auto}" "${runtime:=auto}" "${default_runtime:=no}" "${containerd_config:=/etc/containerd/config.toml}"
    # shellcheck disable=SC2046,SC2086  # words
    settings=$(printf '%s\n' $(remembered settings) $settings | awk -F = '{ value[$1] = $0 } !seen[$1]++ { order[++n] = $1 }
        END { for (i = 1; i <= n; i++) if (value[order[i]] !~ /=$/) printf "%s ", value[order[i]] }')
    for name in engines criu runtime default_runtime containerd_config settings; do
        eval "printf '%s=%s\n' $name \"\$$name\""
    done >"$TMP/options"
}

find_engines() {
    case $engines in
        none) engines='' ;;
        auto)
            engines=''
            for name in podman containerd; do
                if command -v "$name" >/dev/null; then engines=$engines,$name; else say "$name: not found, nothing to register"; fi
            done
            [ ! -d "$ROOT/etc/crio" ] || engines=$engines,crio
            ;;
    esac
    engines=${engines#,}
}

find_runtime() {
    if [ "$runtime" = auto ]; then
        runtime=''
        for name in runc crun; do
            runtime=$(command -v "$name") || continue
            case $(readlink -f "$runtime") in "$PREFIX"/*) runtime='' ;; *) break ;; esac
        done
    fi
    if [ -z "$runtime" ] && { [ -d "$PREFIX/runc" ] || [ -d "${BUNDLE:-/nowhere}/runc" ]; }; then
        runtime=$PREFIX/runc/sbin/runc
        say "OCI runtime: $runtime, the bundle's"
        return 0
    fi
    [ -n "$runtime" ] || fail "no OCI runtime found: apt-get install runc, or give --runtime PATH"
    "$runtime" --version >"$TMP/version" 2>&1 || fail "$runtime --version fails: not an OCI runtime"
    say "OCI runtime: $runtime ($(head -n 1 "$TMP/version"))"
}

check_criu() { # PROGRAM
    "$1" check >"$TMP/criu-check" 2>&1
}

private_criu_wanted() {
    if [ -f "$PREFIX/criu/.smr-id" ] && [ "$(cat "$PREFIX/criu/.smr-id")" = "$(bundled_id || lock_id)" ] && [ -n "$(criu_version "$PREFIX/criu/sbin/criu")" ]; then
        want_tree "$PREFIX/criu" '' ''
    elif [ -n "$DRY" ]; then
        want_tree "$PREFIX/criu" "$TMP/none" "CRIU of Debian $SUITE with its own libraries"
    else
        journal "new$TAB$STATE/criu.new"
        if [ -n "$BUNDLE" ]; then
            cp -R "$BUNDLE/criu/$SUITE" "$STATE/criu.new"
        else
            say "fetching CRIU of Debian $SUITE"
            private_criu "$STATE/criu.new" "$PREFIX/criu"
        fi
        want_tree "$PREFIX/criu" "$STATE/criu.new" "CRIU of Debian $SUITE with its own libraries"
    fi
    criu=$PREFIX/criu/sbin/criu
    [ -n "$DRY" ] || new_enough "$(criu_version "$criu")" || fail "$criu does not run: $("$criu" --version 2>&1 | tail -n 3)"
}

provide_criu() { # sets criu
    if [ "$criu" != auto ]; then
        [ "${criu##*/}" = criu ] || fail "--criu: the program must be named criu, as the runtimes look it up by that name"
        new_enough "$(criu_version "$criu")" || fail "--criu $criu: $LEAST or newer is needed, found '$(criu_version "$criu")' (Linux $KERNEL)"
    else
        machines=$(command -v criu || :)
        case $(readlink -f "${machines:-/}") in "$PREFIX"/*) machines='' ;; esac
        if [ -n "$machines" ] && new_enough "$(criu_version "$machines")" && check_criu "$machines"; then
            criu=$machines
        else
            [ -z "$machines" ] || say "CRIU $(criu_version "$machines") at $machines is too old or does not work here"
            private_criu_wanted
            [ -n "$machines" ] || want_link /usr/local/sbin/criu "$criu" "podman container checkpoint looks for criu on PATH"
        fi
    fi
    [ -x "$criu" ] || return 0
    say "CRIU: $criu ($(criu_version "$criu"))"
    [ -n "$ROOT" ] || check_criu "$criu" || say "warning: criu check: $(grep -i error "$TMP/criu-check" | tail -n 1)"
}

package_id() { # changes when the package, the interpreter or the way to install does
    {
        "$PYTHON" -I -c 'import sys; print(sys.version, sys.executable)'
        if [ -d "$SOURCE" ]; then
            cd "$SOURCE"
            find pyproject.toml proto images shim hooks -type f ! -path '*/__pycache__/*' ! -path '*/.*' -exec sha256sum {} + | sort
        else
            sha256sum <"$SOURCE"
        fi
    } | sha256sum | cut -d' ' -f1
}

build_venv() { # a venv that will live in PREFIX/venv, made beside it: programs name their interpreter by its path
    journal "new$TAB$STATE/venv.new"
    quietly "$PYTHON" -I -m venv "$STATE/venv.new"
    package=$SOURCE
    if [ -d "$SOURCE" ]; then # setuptools writes into the folder it builds
        package=$TMP/source
        mkdir "$package"
        (cd "$SOURCE" && cp -R pyproject.toml README.md LICENSE proto images shim hooks "$package")
    fi
    set -- --no-cache-dir
    [ -z "$CACHE" ] || set -- --cache-dir "$CACHE/pip"
    [ -z "$WHEELS" ] || set -- "$@" --no-index --find-links "$WHEELS"
    quietly "$STATE/venv.new/bin/python" -I -m pip --disable-pip-version-check --no-input install -q --root-user-action=ignore "$@" "$package"
    grep -rlIF "$STATE/venv.new" "$STATE/venv.new/bin" "$STATE/venv.new/pyvenv.cfg" | while read -r file; do
        sed -i "s|$STATE/venv.new|$PREFIX/venv|g" "$file"
    done
    echo "$id" >"$STATE/venv.new/.smr-id"
}

provide_package() {
    if [ -n "$own_python" ]; then
        provide_own_python
        return
    fi
    id=$(package_id)
    if [ "$(cat "$PREFIX/venv/.smr-id" 2>/dev/null)" = "$id" ] && "$PREFIX/venv/bin/python" -I -c 'import smr.shim.register' 2>/dev/null; then
        want_tree "$PREFIX/venv" '' ''
    elif [ -n "$DRY" ]; then
        want_tree "$PREFIX/venv" "$TMP/none" "Python package from ${source_name:-$SOURCE}"
    else
        say "installing the Python package from ${source_name:-$SOURCE} with $PYTHON"
        build_venv
        want_tree "$PREFIX/venv" "$STATE/venv.new" "Python package from ${source_name:-$SOURCE}"
        "$PREFIX/venv/bin/python" -I -c 'import smr.shim.register' || fail "the installed package does not load"
    fi
}

plan() { # VERB
    set -- "$1" --prefix "$PREFIX" --root "${ROOT:-/}" --criu "$criu" --runtime "$runtime" --stage "$TMP/stage" \
        --templates "$HERE/deploy/hooks.d" --engines "$engines" --containerd-config "$containerd_config"
    [ "$default_runtime" = no ] || set -- "$@" --default-runtime
    for setting in $settings; do set -- "$@" --setting "$setting"; done
    register "$@"
}

carry_out() { # the plan's lines
    while IFS=$TAB read -r kind a b c d e <&9; do
        case $kind in
            file) want_file "$a" "$b" "$c" "$d" "$e" ;;
            edit) want_edit "$a" "$b" "$c" "$d" ;;
            link) want_link "$a" "$b" "$c" ;;
            note) say "$a" ;;
        esac
    done 9<"$TMP/plan"
}

engine_files() { # the digest of what an engine reads, to see whether it changed
    case $1 in
        containerd) cat "$ROOT$containerd_config" "$ROOT${containerd_config%/*}"/conf.d/*.toml 2>/dev/null ;;
        crio) cat "$ROOT"/etc/crio/crio.conf.d/*.conf 2>/dev/null ;;
    esac | sha256sum
}

tell_restart() { # ENGINE DIGEST-BEFORE
    [ "$(engine_files "$1")" != "$2" ] && [ -z "$DRY$ROOT" ] || return 0
    if command -v systemctl >/dev/null; then
        service="systemctl restart $1"
    elif command -v rc-service >/dev/null; then
        service="rc-service $1 restart"
    else
        say "to take effect, $1 must be restarted"
        return 0
    fi
    if [ -n "$restart" ]; then
        say "restarting $1"
        $service || say "warning: $service failed"
    else
        say "to take effect, type: $service"
    fi
}

in_use() { # the engines' processes of containers that run through this installation
    for process in /proc/[0-9]*; do
        case $(cat "$process/comm" 2>/dev/null) in conmon | containerd-shim*) ;; *) continue ;; esac
        if tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qF "$PREFIX/" || through_shim "$process"; then
            printf ' %s' "${process##*/}"
        fi
    done
}

through_shim() { # PROCESS: its PATH begins with our folder, or one whose runc is ours
    path=$(tr '\0' '\n' 2>/dev/null <"$1/environ" | sed -n 's/^PATH=//p')
    case $path in
        *"$PREFIX/"*) ;;
        */smr-path:*) case $(readlink "$1/root${path%%:*}/runc") in "$PREFIX"/*) ;; *) return 1 ;; esac ;;
        *) return 1 ;;
    esac
}

finish() {
    if [ "$changes" = 0 ]; then say "nothing to change"; elif [ -n "$DRY" ]; then say "dry run: nothing was changed"; fi
}

install_all() {
    settle_options
    [ -z "$BUNDLE" ] || open_bundle
    find_python needed
    find_engines
    find_runtime
    begin
    provide_runc
    provide_criu
    provide_package
    mkdir "$TMP/stage"
    plan plan >"$TMP/plan" || fail "nothing was registered"
    containerd_before=$(engine_files containerd) crio_before=$(engine_files crio)
    carry_out
    sweep
    [ -n "$DRY" ] || plan check || fail "the configuration is put back"
    [ -n "$DRY" ] || cmp -s "$TMP/options" "$STATE/options" || { save "$STATE/options" && cp "$TMP/options" "$STATE/options"; }
    commit
    tell_restart containerd "$containerd_before"
    tell_restart crio "$crio_before"
    finish
}

criu_only() {
    [ -z "$BUNDLE" ] || open_bundle
    begin
    private_criu_wanted
    commit
    [ -n "$DRY" ] || say "CRIU: $criu ($(criu_version "$criu"))"
    finish
}

uninstall() {
    settle_options
    pids=$(in_use)
    [ -z "$pids" ] || [ -n "$force" ] || fail "containers run that need SMR (processes$pids): stop them first, or give --force"
    recover
    if [ -f "$STATE/manifest" ]; then
        find_python if-there
        begin
        : >"$TMP/manifest"
        containerd_before=$(engine_files containerd) crio_before=$(engine_files crio)
        sweep
        commit
        tell_restart containerd "$containerd_before"
        tell_restart crio "$crio_before"
    fi
    for path in "$ROOT/run/smr" "$ROOT/var/log/smr"; do remove_data "$path"; done
    if [ -n "$purge" ]; then
        remove_data "$ROOT/var/lib/smr"
    elif [ -d "$ROOT/var/lib/smr" ]; then
        say "keep $ROOT/var/lib/smr (the checkpoint images; --purge removes them)"
    fi
    finish
}

remove_data() {
    there "$1" || return 0
    note_change remove "$1/"
    [ -n "$DRY" ] || rm -rf "$1"
}

[ "$(id -u)" = 0 ] || fail "must be run as root"
[ -z "$ROOT" ] || [ -d "$ROOT" ] || fail "--root: $ROOT is no folder"
ARCH=$(dpkg --print-architecture 2>/dev/null || uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
export ARCH
case $verb in
    install) install_all ;;
    uninstall) uninstall ;;
    criu_only) criu_only ;;
    make_bundle) make_bundle "$bundle_file" ;;
esac
