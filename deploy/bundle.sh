# shellcheck shell=sh
# A bundle: one file with all that install.sh would fetch, made where there is a network and used where there is none.
# Sourced by install.sh, after transaction.sh and criu.sh.
#
#   smr-bundle/format               1 ARCHITECTURE PREFIX
#   smr-bundle/wheels/              the package and what it needs, for each of the nodes' Pythons
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
    : "${PYTHONS:=3.11 3.12 3.13}"
    if [ -n "$DRY" ]; then
        say "would create $1 (wheels for Python$(printf ' %s' $PYTHONS), CRIU${with_runc:+, runc}, for --prefix $PREFIX on $ARCH)"
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
    cp -R "$HERE/install.sh" "$HERE/deploy" "$tree/"
    echo "$BUNDLE_FORMAT $ARCH $PREFIX" >"$tree/format"
    tar -C "$TMP" --sort=name --owner=0 --group=0 --numeric-owner -cf - smr-bundle | gzip -9n >"$TMP/bundle"
    mv "$TMP/bundle" "$1.smr-new" && mv "$1.smr-new" "$1" || fail "cannot write $1"
    say "create $1 ($(du -k "$1" | cut -f1) KiB)"
}

bundle_wheels() { # FOLDER
    machine=$(echo "$ARCH" | sed 's/amd64/x86_64/; s/arm64/aarch64/')
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
            $(printf -- "--platform manylinux%s_$machine " 2014 _2_17 _2_27 _2_28) \
            ${WHEELS:+--no-index --find-links "$WHEELS"} ${CACHE:+--cache-dir "$CACHE/pip"} "$package"
    done
}

bundle_criu() { # SUITE LOCK
    SUITE=$1 LOCK=$2
    say "fetching CRIU of Debian $SUITE"
    rm -rf "$TMP/tree" "$TMP/apt"
    private_criu "$TMP/smr-bundle/criu/$SUITE" "$PREFIX/criu"
}

bundle_runc() { # of the last suite; its packages are not pinned: apt verifies their signature
    say "fetching runc of Debian $SUITE"
    rm -rf "$TMP/tree" "$TMP/get" && mkdir "$TMP/tree" "$TMP/get"
    [ -f "$TMP/apt/sources.list" ] || suite_update
    for package in $(suite_apt apt-get -s --no-install-recommends install runc patchelf | sed -n 's/^Inst \([^ ]*\) .*/\1/p'); do
        (cd "$TMP/get" && suite_apt apt-get download "$package") >"$TMP/apt/log" 2>&1 || fail "cannot fetch $package: $(tail -n 3 "$TMP/apt/log")"
    done
    for deb in "$TMP"/get/*.deb; do
        dpkg-deb -x "$deb" "$TMP/tree"
    done
    privately "$TMP/smr-bundle/runc" "$PREFIX/runc" runc
    for deb in "$TMP"/get/*.deb; do echo "${deb##*/}"; done | sha256sum | cut -d' ' -f1 >"$TMP/smr-bundle/runc/.smr-id"
}
