# shellcheck shell=sh
# CRIU of a newer Debian in a folder of its own, with its own loader and libraries: nothing of the machine's is touched, and it
# runs on any glibc. Sourced by install.sh and dev/criu-lock, which set HERE (the folder of install.sh) and TMP.
#
# Packages come from the Debian archive that the machine's own apt uses, through an apt with a state of its own, so that apt
# verifies the archive's signature. Versions and sums are pinned in criu.lock:  PACKAGE VERSION ARCHITECTURE SHA256
# When a point release has replaced a pinned version, the suite's present one is taken, verified by apt alone, with a warning.
#
# CRIU before 4.2 asks every socket for SO_PASSCRED, which Linux 6.16 and newer refuse for all but unix sockets: there a process
# with an inet socket cannot be dumped, although `criu check` is content. Such machines get the next Debian's, of
# criu-next.lock, until a stable Debian has a newer one.

loader='' libraries='' # of the unpacked tree, set by find_libraries
KERNEL=${SMR_TEST_KERNEL:-$(uname -r)}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
export DEBIAN_FRONTEND=noninteractive

criu_version() { # PROGRAM: as 4.1.1, empty where there is none
    "$1" --version 2>/dev/null | sed -n 's/^Version: *v*\([0-9.]*\).*/\1/p'
}

at_least() { # VERSION MAJOR MINOR
    major=${1%%.*} rest=${1#*.}
    minor=${rest%%[!0-9]*}
    case $major$minor in '' | *[!0-9]*) return 1 ;; esac
    [ "$major" -gt "$2" ] || { [ "$major" -eq "$2" ] && [ "${minor:-0}" -ge "$3" ]; }
}

if at_least "$KERNEL" 6 16; then
    SUITE=forky LOCK=$HERE/deploy/criu-next.lock LEAST=4.2
else
    SUITE=trixie LOCK=$HERE/deploy/criu.lock LEAST=4.1
fi

new_enough() { # VERSION: what this kernel needs
    at_least "$1" "${LEAST%.*}" "${LEAST#*.}"
}

archives() { # addresses of the archives in the machine's apt sources, those of main suites first; needs no lists
    # shellcheck disable=SC2016
    apt-get --no-release-info indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$3 == "main" && !seen[$1]++ { if ($2 ~ /-|\//) last = last $1 "\n"; else print $1 } END { printf "%s", last }'
}

suite_apt() { # PROGRAM ARGUMENT...: apt of SUITE alone, which knows no installed package
    program=$1
    shift
    "$program" -q -o Dir::Etc::sourcelist="$TMP/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::lists="$TMP/apt/lists" -o Dir::Cache="$TMP/apt/cache" \
        -o Dir::State::status=/dev/null -o Acquire::Languages=none -o APT::Sandbox::User=root \
        -o APT::Architecture="$ARCH" -o APT::Architectures="$ARCH" "$@"
}

suite_update() { # lists of SUITE from the first archive that carries it
    [ -f "$KEYRING" ] || fail "cannot verify Debian's packages without $KEYRING: apt-get install debian-archive-keyring, or give --criu PATH"
    mkdir -p "$TMP/apt/lists/partial" "$TMP/apt/cache/archives/partial"
    for archive in ${MIRROR:-$(archives)}; do
        echo "deb [signed-by=$KEYRING] $archive $SUITE main" >"$TMP/apt/sources.list"
        if suite_apt apt-get -o APT::Update::Error-Mode=any update >"$TMP/apt/log" 2>&1; then return; fi
    done
    fail "no archive of this machine's apt sources carries Debian $SUITE; give --criu PATH or --mirror ADDRESS
$(tail -n 3 "$TMP/apt/log" 2>/dev/null)"
}

deb_name() { echo "$1_$(echo "$2" | sed 's/:/%3a/')_$3.deb"; }

fetch_deb() { # PACKAGE VERSION SHA256: leaves it in DEBS under the lock's name
    deb=$DEBS/$(deb_name "$1" "$2" "$ARCH")
    if [ -f "$deb" ] && [ "$(sha256sum <"$deb")" = "$3  -" ]; then return; fi
    rm -f "$deb"
    [ -f "$TMP/apt/sources.list" ] || suite_update
    rm -rf "$TMP/get" && mkdir "$TMP/get"
    if (cd "$TMP/get" && suite_apt apt-get download "$1=$2") >"$TMP/apt/log" 2>&1; then
        [ "$(cat "$TMP"/get/*.deb | sha256sum)" = "$3  -" ] || fail "$1 $2: its SHA-256 is not the one in $LOCK; nothing was unpacked"
    else
        (cd "$TMP/get" && suite_apt apt-get download "$1") >"$TMP/apt/log" 2>&1 || fail "cannot fetch $1: $(tail -n 3 "$TMP/apt/log")"
        say "warning: $1 $2 is no longer in Debian $SUITE; taking $(basename "$TMP"/get/*.deb), verified by apt's signature only"
        deb=$TMP/get-$1.deb # not under a pinned name
        echo "$deb" >>"$TMP/unpinned"
    fi
    mv "$TMP"/get/*.deb "$deb"
}

unpack_debs() { # all packages of the lock, in $TMP/tree
    DEBS=${CACHE:-$TMP}/debs
    mkdir -p "$DEBS" "$TMP/tree"
    : >"$TMP/unpinned"
    awk -v arch="$ARCH" '$1 !~ /^#/ && $3 == arch' "$LOCK" >"$TMP/lock"
    [ -s "$TMP/lock" ] || fail "no CRIU packages are known for $ARCH; give --criu PATH"
    while read -r package version _ sum <&6; do
        fetch_deb "$package" "$version" "$sum"
        dpkg-deb -x "$deb" "$TMP/tree"
    done 6<"$TMP/lock"
    [ -s "$TMP/unpinned" ] || return 0
    # A newer version may need libraries that the lock does not know.
    closure | while read -r package _; do
        grep -q "^$package " "$TMP/lock" && continue
        (cd "$TMP/get" && suite_apt apt-get download "$package") >"$TMP/apt/log" 2>&1 || fail "cannot fetch $package: $(tail -n 3 "$TMP/apt/log")"
        dpkg-deb -x "$TMP"/get/*.deb "$TMP/tree" && rm -f "$TMP"/get/*.deb
    done
}

closure() { # PACKAGE VERSION of all that criu and patchelf depend on
    suite_apt apt-get -s --no-install-recommends install criu patchelf | sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1 \2/p'
}

tree_patchelf() { # patchelf of the machine, else the unpacked one through its own loader
    if command -v patchelf >/dev/null; then
        patchelf "$@"
    else
        "$loader" --library-path "$libraries:$TMP/tree/lib" "$TMP/tree/usr/bin/patchelf" "$@"
    fi
}

needed() { # FILE: the libraries it needs, but for the loader
    tree_patchelf --print-needed "$1" | grep -v '^ld-linux'
}

find_libraries() { # sets loader and libraries for the unpacked tree
    loader=$(find "$TMP/tree" -name 'ld-linux-*.so.*' | head -n 1)
    libraries=$(dirname "$(find "$TMP/tree" -name 'libc.so.6' | head -n 1)")
}

collect() { # DEST FILE...: into DEST/lib all the libraries that the files need, directly or not
    dest=$1
    shift
    queue=$*
    while [ -n "$queue" ]; do
        next=''
        for file in $queue; do
            for name in $(needed "$file"); do
                [ ! -e "$dest/lib/$name" ] || continue
                cp -L "$libraries/$name" "$dest/lib/$name" 2>/dev/null || fail "the packages of Debian $SUITE lack $name, which $(basename "$file") needs"
                next="$next $dest/lib/$name"
            done
        done
        queue=$next
    done
}

private_criu() { # DEST FINAL: builds in DEST what will run from FINAL
    unpack_debs
    privately "$1" "$2" criu
    lock_id >"$1/.smr-id"
}

privately() { # DEST FINAL PROGRAM: of the unpacked tree, with its own loader and libraries
    find_libraries
    mkdir -p "$1/sbin" "$1/lib"
    cp "$TMP/tree/usr/sbin/$3" "$1/sbin/$3"
    collect "$1" "$1/sbin/$3"
    own_loader "$1" "$2" "sbin/$3"
    chmod 0755 "$1" "$1/sbin" "$1/lib" "$1/sbin/$3"
}

own_loader() { # DEST FINAL PROGRAM: a program in DEST that will run from FINAL finds its loader and libraries in lib
    cp -L "$loader" "$1/lib/"
    # patchelf 0.18 breaks large programs when it does both at once, or in the other order.
    # shellcheck disable=SC2016  # $ORIGIN is the loader's
    tree_patchelf --force-rpath --set-rpath '$ORIGIN/../lib' "$1/$3"
    tree_patchelf --set-interpreter "$2/lib/${loader##*/}" "$1/$3"
    # shellcheck disable=SC2016
    for library in "$1"/lib/*; do
        [ -f "$library" ] || continue
        case ${library##*/} in libc.so.6 | ld-linux*) ;; *) tree_patchelf --force-rpath --set-rpath '$ORIGIN' "$library" ;; esac
    done
}

lock_id() { awk -v arch="$ARCH" '$1 !~ /^#/ && $3 == arch' "$LOCK" | sha256sum | cut -d' ' -f1; }
