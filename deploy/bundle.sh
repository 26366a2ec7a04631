# shellcheck shell=sh
# A bundle: one file with all that install.sh would fetch, made where there is a network and used where there is none.
# Sourced by install.sh, after transaction.sh and criu.sh.
#
#   smr-bundle/format               1 ARCHITECTURE PREFIX
#   smr-bundle/wheels/              the package and what it needs, for each of the nodes' Pythons
#   smr-bundle/python/              a Python of our own with all that in it, and a shell; only with --with-python (deploy/python.sh)
#   smr-bundle/criu/SUITE/          CRIU as it will stand in PREFIX/criu, for older kernels and for newer ones
#   smr-bundle/runc/                runc as it will stand in PREFIX/runc; only with --with-runc
#   smr-bundle/install.sh, deploy/  so that the file alone is enough: tar -xf FILE && smr-bundle/install.sh --bundle smr-bundle

BUNDLE_FORMAT=1

open_bundle() { # unpacks BUNDLE when it is a file; the package and its needs come from it
    if [ -f "$BUNDLE" ]; then
        tar -C "$TMP" -xzf "$BUNDLE" smr-bundle || fail "$BUNDLE cannot be unpacked: make it with install.sh --make-bundle"
        BUNDLE=$TMP/smr-bundle
    fi
    [ -f "$BUNDLE/format" ] || fail "$BUNDLE is no bundle of install.sh --make-bundle"
    read -r format architecture prefix <"$BUNDLE/format"
    [ "$format" = "$BUNDLE_FORMAT" ] || fail "the bundle has format $format, this install.sh reads $BUNDLE_FORMAT: use the bundle's own install.sh"
    [ "$architecture" = "$ARCH" ] || fail "the bundle is for $architecture, this machine is $ARCH"
    [ "$prefix" = "$PREFIX" ] || fail "the bundle is for --prefix $prefix: give that, or make one with --make-bundle FILE --prefix $PREFIX"
    [ -d "$BUNDLE/wheels" ] || return 0
    WHEELS=$BUNDLE/wheels
    # shellcheck disable=SC2034  # install.sh prints it in place of a temporary path
    [ "$SOURCE" != "$HERE" ] || { SOURCE=$(find "$WHEELS" -name 'smr_restore-*.whl') && source_name='the bundle'; }
}

bundled_id() { [ -n "$BUNDLE" ] && cat "$BUNDLE/criu/$SUITE/.smr-id"; }

provide_runc() { # the bundle's, where find_runtime chose it
    [ "$runtime" = "$PREFIX/runc/sbin/runc" ] || return 0
    if [ -z "$BUNDLE" ] || cmp -s "$BUNDLE/runc/.smr-id" "$PREFIX/runc/.smr-id"; then
        want_tree "$PREFIX/runc" '' ''
    else
        [ -n "$DRY" ] || { journal "new$TAB$STATE/runc.new" && cp -R "$BUNDLE/runc" "$STATE/runc.new"; } || fail "cannot copy runc"
        want_tree "$PREFIX/runc" "$STATE/runc.new" "runc with its own libraries"
    fi
    [ -n "$DRY" ] || "$runtime" --version >"$TMP/version" 2>&1 || fail "$runtime does not run: $(tail -n 3 "$TMP/version")"
}

make_bundle() { # FILE
    wheels_wanted=$PYTHONS
    : "${PYTHONS:=${with_python:+$PYTHON_OWN}}" "${PYTHONS:=3.11 3.12 3.13}"
    [ -z "$with_python" ] || case "$PYTHONS " in *"$PYTHON_OWN "*) ;; *) PYTHONS="$PYTHONS $PYTHON_OWN" ;; esac
    if [ -n "$DRY" ]; then
        say "would create $1 (wheels for Python$(printf ' %s' $PYTHONS), CRIU${with_runc:+, runc}${with_python:+, Python $PYTHON_OWN}, for --prefix $PREFIX on $ARCH)"
        return
    fi
    [ -d "$(dirname "$1")" ] || fail "--make-bundle: no folder $(dirname "$1")"
    PYTHON='' # the nodes' was meant
    find_python needed
    tree=$TMP/smr-bundle
    mkdir -p "$tree/wheels" "$tree/criu"
    bundle_wheels "$tree/wheels"
    bundle_criu trixie "$HERE/deploy/criu.lock"
    bundle_criu forky "$HERE/deploy/criu-next.lock"
    [ -z "$with_runc" ] || bundle_runc
    [ -z "$with_python" ] || bundle_python
    [ -n "$wheels_wanted" ] || [ -z "$with_python" ] || rm -rf "$tree/wheels"
    cp -R "$HERE/install.sh" "$HERE/deploy" "$tree/"
    echo "$BUNDLE_FORMAT $ARCH $PREFIX" >"$tree/format"
    if [ -n "$bundle_folder" ]; then
        [ ! -e "$1" ] || fail "--make-bundle: $1 is there already"
        mv "$tree" "$1" || fail "cannot write $1"
        say "create $1/ ($(du -sk "$1" | cut -f1) KiB)"
        return
    fi
    tar -C "$TMP" --sort=name --owner=0 --group=0 --numeric-owner -cf - smr-bundle | gzip -9n >"$TMP/bundle"
    mv "$TMP/bundle" "$1.smr-new" && mv "$1.smr-new" "$1" || fail "cannot write $1"
    say "create $1 ($(du -k "$1" | cut -f1) KiB)"
}

manylinux() { # pip's words for the kinds of wheels that run on the nodes
    # shellcheck disable=SC2046
    printf -- "--platform manylinux%s_$(echo "$ARCH" | sed 's/amd64/x86_64/; s/arm64/aarch64/') " 2014 _2_17 _2_27 _2_28
}

bundle_wheels() { # FOLDER
    quietly "$PYTHON" -I -m venv "$TMP/pip"
    set -- "$1" "$TMP/pip/bin/python" -I -m pip --disable-pip-version-check --no-input
    folder=$1
    shift
    say "building the package from $SOURCE"
    if [ -d "$SOURCE" ]; then
        mkdir "$TMP/build"
        (cd "$SOURCE" && cp -R pyproject.toml README.md LICENSE proto images shim hooks "$TMP/build")
        quietly "$@" wheel -q --no-deps -w "$folder" "$TMP/build"
    else
        cp "$SOURCE" "$folder/"
    fi
    package=$(find "$folder" -name 'smr_restore-*.whl')
    for version in $PYTHONS; do
        say "fetching what it needs for Python $version"
        # shellcheck disable=SC2046
        quietly "$@" download -q -d "$folder" --only-binary=:all: --implementation cp --python-version "$version" \
            $(manylinux) \
            ${WHEELS:+--no-index --find-links "$WHEELS"} ${CACHE:+--cache-dir "$CACHE/pip"} "$package"
    done
}

bundle_criu() { # SUITE LOCK
    SUITE=$1 LOCK=$2
    say "fetching CRIU of Debian $SUITE"
    rm -rf "$TMP/tree" "$TMP/apt"
    private_criu "$TMP/smr-bundle/criu/$SUITE" "$PREFIX/criu"
    [ -z "$with_python" ] || criu_tools "$TMP/smr-bundle/criu/$SUITE"
}

criu_tools() { # DEST: tar beside CRIU, which calls it with GNU's options for what is in a tmpfs; busybox's does not know them
    unpack_suite tar patchelf
    find_libraries
    cp "$TMP/tree/usr/bin/tar" "$1/sbin/tar"
    collect "$1" "$1/sbin/tar"
    own_loader "$1" "$PREFIX/criu" sbin/tar
    echo "$(cat "$1/.smr-id") tar" >"$1/.smr-id"
}

bundle_runc() { # of the suite of the last CRIU
    say "fetching runc of Debian $SUITE"
    unpack_suite runc patchelf
    privately "$TMP/smr-bundle/runc" "$PREFIX/runc" runc
    for deb in "$TMP"/get/*.deb; do echo "${deb##*/}"; done | sha256sum | cut -d' ' -f1 >"$TMP/smr-bundle/runc/.smr-id"
}

unpack_suite() { # PACKAGE...: with all they depend on, in $TMP/tree; not pinned: apt verifies their signature
    rm -rf "$TMP/tree" "$TMP/get" && mkdir "$TMP/tree" "$TMP/get"
    grep -q " $SUITE " "$TMP/apt/sources.list" 2>/dev/null || { rm -rf "$TMP/apt" && suite_update; }
    # shellcheck disable=SC2046
    (cd "$TMP/get" && suite_apt apt-get download $(suite_apt apt-get -s --no-install-recommends install "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p')) \
        >"$TMP/apt/log" 2>&1 || fail "cannot fetch $*: $(tail -n 3 "$TMP/apt/log")"
    for deb in "$TMP"/get/*.deb; do
        dpkg-deb -x "$deb" "$TMP/tree"
    done
}
