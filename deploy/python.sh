# shellcheck shell=sh
# A Python of our own for nodes that have none, or another: Debian's, with its own loader, libc and libraries, the package and what
# it needs already in it, and a static busybox as the shell of our scripts. It stands in PREFIX/venv as a venv would.
# Sourced by install.sh, after criu.sh (which sets loader and libraries) and bundle.sh.
#
#   venv/bin/python3      CPython, whose loader is venv/lib/ld-linux-*
#   venv/bin/sh           busybox; smr-runtime and the shims name it in their first line
#   venv/lib/             libraries of libc, Python and its modules; pythonX.Y with the package

PYTHON_SUITE=trixie PYTHON_OWN=3.13

bundle_python() { # after bundle_wheels: in $TMP/smr-bundle/python, as it will stand in PREFIX/venv
    SUITE=$PYTHON_SUITE own=$TMP/smr-bundle/python
    say "fetching Python $PYTHON_OWN and busybox of Debian $SUITE"
    unpack_suite "libpython$PYTHON_OWN-stdlib" "python$PYTHON_OWN-minimal" busybox-static libstdc++6 patchelf
    find_libraries
    mkdir -p "$own/bin" "$own/lib"
    cp "$TMP/tree/usr/bin/python$PYTHON_OWN" "$own/bin/python3"
    ln -s python3 "$own/bin/python"
    cp "$(find "$TMP/tree" -name busybox -path '*bin*' | head -n 1)" "$own/bin/sh"
    cp -R "$TMP/tree/usr/lib/python$PYTHON_OWN" "$own/lib/"
    site=$own/lib/python$PYTHON_OWN
    (cd "$site" && rm -rf __pycache__ EXTERNALLY-MANAGED test idlelib tkinter turtledemo ensurepip pydoc_data lib2to3 config-*)
    own_packages "$site/dist-packages"
    # All of libc's: the driver's libraries ask for those that are empty today, such as libdl.
    # shellcheck disable=SC2154
    for library in "$libraries"/lib*.so.*; do
        case ${library##*/} in
            libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | libresolv.so.* | libutil.so.* | libnss_*.so.*) cp -L "$library" "$own/lib/" ;;
        esac
    done
    find "$own/bin/python3" "$site" -name '*.so' -o -path "$own/bin/python3" >"$TMP/modules"
    # shellcheck disable=SC2046
    collect "$own" $(cat "$TMP/modules")
    own_loader "$own" "$PREFIX/venv" bin/python3
    # shellcheck disable=SC2154
    (cd "$own" && "lib/${loader##*/}" --library-path lib bin/python3 -I -m compileall -q "lib/python$PYTHON_OWN") >"$TMP/log" 2>&1 ||
        fail "the bundle's Python does not run: $(tail -n 3 "$TMP/log")"
    (cd "$own" && find . -type f -exec sha256sum {} + | sort | sha256sum | cut -d' ' -f1) >"$TMP/id" && mv "$TMP/id" "$own/.smr-id"
}

own_packages() { # FOLDER: the package and what it needs, from the wheels; programs go to bin
    # shellcheck disable=SC2046
    quietly "$TMP/pip/bin/python" -I -m pip --disable-pip-version-check --no-input install -q --no-index --find-links "$TMP/smr-bundle/wheels" \
        --target "$1" --no-compile --only-binary=:all: --implementation cp --python-version "$PYTHON_OWN" \
        $(manylinux) smr-restore
    for program in "$1"/bin/*; do
        case ${program##*/} in smr | smr-* | containerd-shim-smr-*) ;; *) continue ;; esac
        case $(head -n 1 "$program") in
            '#!'*python*) line="#!$PREFIX/venv/bin/python3" ;;
            *) line="#!$PREFIX/venv/bin/sh" ;;
        esac
        { echo "$line" && tail -n +2 "$program"; } >"$own/bin/${program##*/}"
        chmod 0755 "$own/bin/${program##*/}"
    done
    rm -rf "${1:?}/bin"
}

bundled_python() { # sets PYTHON to a program that runs the bundle's Python where it lies now
    set -- "$BUNDLE"/python/lib/ld-linux-*
    cat >"$TMP/python" <<TEXT
#!$BUNDLE/python/bin/sh
exec "$1" --library-path "$BUNDLE/python/lib" "$BUNDLE/python/bin/python3" "\$@"
TEXT
    chmod 0755 "$TMP/python"
    PYTHON=$TMP/python
    "$PYTHON" -I -c '' || fail "the bundle's Python does not run here"
}

provide_own_python() { # the bundle's tree, in place of a venv that pip makes
    id=$(cat "$BUNDLE/python/.smr-id")
    if [ "$(cat "$PREFIX/venv/.smr-id" 2>/dev/null)" = "$id" ] && "$PREFIX/venv/bin/python3" -I -c 'import smr.shim.register' 2>/dev/null; then
        want_tree "$PREFIX/venv" '' ''
        return
    fi
    why="Python $(cd "$BUNDLE/python/lib" && echo python3.*) of the bundle, with the package"
    [ -n "$DRY" ] || { journal "new$TAB$STATE/venv.new" && cp -a "$BUNDLE/python" "$STATE/venv.new"; } || fail "cannot copy the bundle's Python"
    want_tree "$PREFIX/venv" "$STATE/venv.new" "$why"
    [ -n "$DRY" ] || "$PREFIX/venv/bin/python3" -I -c 'import smr.shim.register' || fail "the installed package does not load"
}
