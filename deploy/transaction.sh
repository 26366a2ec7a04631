# shellcheck shell=sh
# Changes to a machine, recorded before they are made, so that a run that fails or is killed leaves nothing of itself.
# Sourced by install.sh, which sets PREFIX, ROOT, TMP (a scratch folder) and DRY (not empty: only say what would be done).
#
# A run declares everything that is to exist (want_*). What differs is changed; what an earlier run declared and this one does
# not is taken away (sweep). So an uninstall is a run that declares nothing.
#
#   $PREFIX/.install/manifest     what exists because of us, one a line, in the order it was made; fields separated by tabs:
#                                   dir PATH | tree PATH | file PATH SHA256 | link PATH TARGET | edit PATH SHA256 ORIGINAL
#   $PREFIX/.install/originals/   other people's files that we edited, without our lines
#   $PREFIX/.install/journal      what the run in progress does, undone from its end:
#                                   new PATH | saved PATH COPY | mkdir PATH | rmdir PATH
#   $PREFIX/.install/undo/        the copies that the journal names
#
# The manifest is replaced, then the journal is removed: that is the commit. A journal that is there at the start belongs to a
# run that was killed outright: it is undone first.

TAB=$(printf '\t')
STATE=$PREFIX/.install
changes=0 saves=0
running='' # set while there is something to undo; install.sh looks at it when it ends

say() { printf '%s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
note_change() { # VERB PATH [WHY]
    changes=$((changes + 1))
    say "${DRY:+would }$1 $2${3:+ ($3)}"
}

here() { # where a path of the node lies: below ROOT, but for the prefix
    case $1 in
        "$PREFIX" | "$PREFIX"/*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$ROOT$1" ;;
    esac
}
digest() { sha256sum <"$1" | cut -d' ' -f1; }
there() { [ -e "$1" ] || [ -L "$1" ]; }
backwards() { sed '1!G;h;$!d' "$1"; }
recorded() { # KIND PATH: that line of the last run
    [ ! -f "$STATE/manifest" ] || awk -F '\t' -v kind="$1" -v path="$2" '$1 == kind && $2 == path' "$STATE/manifest"
}
declared() { grep -qxF "$1" "$TMP/manifest"; }
want_line() { printf '%s\n' "$1" >>"$TMP/manifest"; }
journal() { printf '%s\n' "$1" >>"$STATE/journal"; }

recover() { # undo what a run that was killed outright left
    if [ -f "$STATE/journal" ] && [ -n "$DRY" ]; then
        say "an earlier run was killed: a run would first undo it"
    elif [ -f "$STATE/journal" ]; then
        lock
        say "an earlier run was killed: undoing it"
        undo
    fi
}

begin() {
    : >"$TMP/manifest"
    recover
    made='' dir=$PREFIX
    while [ ! -d "$dir" ]; do made="$dir $made" dir=$(dirname "$dir"); done
    [ -n "$DRY" ] || open_state
    for dir in $made; do note_change create "$dir/"; done
    around='' dir=$PREFIX
    while [ "$dir" != / ]; do
        case " $made" in
            *" $dir "*) around="$dir $around" ;;
            *) [ -z "$(recorded dir "$dir")" ] || around="$dir $around" ;;
        esac
        dir=$(dirname "$dir")
    done
    for dir in $around; do want_line "dir$TAB$dir"; done
}

lock() { # on the folder around the prefix, so that it can be held before the prefix is there
    exec 8<"$(dirname "$PREFIX")"
    if command -v flock >/dev/null; then
        flock -n 8
    else # as in Debian's busybox; the lock stays with our descriptor
        "${PYTHON:-$PREFIX/venv/bin/python3}" -I -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null
    fi || fail "another run is in progress"
}

open_state() {
    mkdir -p "$(dirname "$PREFIX")"
    lock
    running=1
    mkdir -p "$STATE"
    { printf 'new\t%s\n' "$TMP" && for dir in $made; do printf 'mkdir\t%s\n' "$dir"; done; } >"$STATE/journal"
    mkdir -p "$STATE/undo" "$STATE/originals"
}

save() { # PATH [tree]: keep what is there, before it is replaced or removed
    saves=$((saves + 1))
    copy=$STATE/undo/$saves
    if ! there "$1"; then
        journal "new$TAB$1"
    elif [ -n "${2-}" ]; then
        journal "saved$TAB$1$TAB$copy" && mv -T "$1" "$copy"
    else
        cp -a "$1" "$copy" && journal "saved$TAB$1$TAB$copy"
    fi
}

put() { # STAGED PATH [MODE]: atomically; without MODE owner and mode stay
    journal "new$TAB$2.smr-new"
    if [ -n "${3-}" ]; then
        install -m "$3" "$1" "$2.smr-new" || return 1
    else
        cp -a "$2" "$2.smr-new" && cat "$1" >"$2.smr-new" || return 1
    fi
    sync "$2.smr-new" && mv -fT "$2.smr-new" "$2"
}

undo() { # all that the journal holds, from its end; a failure is told and the rest goes on
    running=''
    : >"$TMP/made"
    if [ -f "$STATE/journal" ]; then
        backwards "$STATE/journal" >"$TMP/undo"
        while IFS=$TAB read -r kind path copy; do
            case $kind in
                new) [ "$path" = "$TMP" ] || rm -rf "$path" ;; # our own goes at the very end
                saved) ! there "$copy" || { rm -rf "$path" && mv -T "$copy" "$path"; } ;;
                rmdir) mkdir -p "$path" ;;
                mkdir) case $STATE in "$path"/*) echo "$path" >>"$TMP/made" ;; *) [ ! -d "$path" ] || rmdir "$path" ;; esac ;;
            esac || printf 'install.sh: could not undo: %s %s\n' "$kind" "$path" >&2
        done <"$TMP/undo"
    fi
    rm -rf "$STATE/journal" "$STATE/undo"
    [ -f "$STATE/manifest" ] || rm -rf "$STATE"
    while read -r path; do rmdir "$path"; done <"$TMP/made"
}

want_dir() { # PATH
    dir=$(here "$1")
    case $1 in / | "$PREFIX") return 0 ;; esac
    [ "$dir" = "$1" ] && [ -d "$dir" ] && [ -z "$(recorded dir "$dir")" ] && return 0
    want_dir "$(dirname "$1")"
    dir=$(here "$1")
    declared "dir$TAB$dir" && return 0
    if [ -d "$dir" ]; then
        [ -z "$(recorded dir "$dir")" ] || want_line "dir$TAB$dir"
        return 0
    fi
    note_change create "$dir/"
    want_line "dir$TAB$dir"
    [ -n "$DRY" ] || { journal "mkdir$TAB$dir" && mkdir "$dir"; } || fail "cannot make $dir"
}

mine() { # KIND PATH: fails the run when something else than ours is there
    [ -n "$(recorded "$1" "$2")" ] || ! there "$2" || fail "$2 is there and is not install.sh's: move it away first"
}

want_file() { # MODE PATH STAGED keep|replace WHY
    want_dir "$(dirname "$2")"
    path=$(here "$2")
    mine file "$path"
    line=$(recorded file "$path")
    if [ "$4" = keep ] && [ -n "$line" ] && [ -f "$path" ] && [ "$(digest "$path")" != "${line##*"$TAB"}" ]; then
        cmp -s "$3" "$path" || say "keep $path as you edited it"
        want_line "$line"
        return 0
    fi
    want_line "file$TAB$path$TAB$(digest "$3")"
    ! cmp -s "$3" "$path" || return 0
    if there "$path"; then note_change change "$path" "$5"; else note_change create "$path" "$5"; fi
    [ -n "$DRY" ] || { save "$path" && put "$3" "$path" "$1"; } || fail "cannot write $path"
}

writable() { # PATH: whether a file can be made there, or in the nearest folder that is there
    dir=$(dirname "$1")
    while [ ! -d "$dir" ]; do dir=$(dirname "$dir"); done
    touch -c -r "$dir" "$dir" 2>/dev/null # busybox's test -w does not ask the kernel
}

want_link() { # PATH TARGET WHY
    path=$(here "$1")
    if [ "$(readlink "$path" || :)" != "$2" ] && ! writable "$path"; then
        say "$path is not linked ($3): its folder is read-only"
        return
    fi
    want_dir "$(dirname "$1")"
    path=$(here "$1")
    mine link "$path"
    want_line "link$TAB$path$TAB$2"
    [ "$(readlink "$path" || :)" != "$2" ] || return 0
    note_change link "$path -> $2" "$3"
    [ -z "$DRY" ] || return 0
    save "$path"
    journal "new$TAB$path.smr-new"
    ln -sfT "$2" "$path.smr-new"
    mv -fT "$path.smr-new" "$path"
}

want_edit() { # PATH STAGED BASE WHY: someone else's file; BASE is what it is without our lines
    path=$(readlink -f "$(here "$1")")
    case $path in "$ROOT"/*) ;; *) fail "$1 leads out of $ROOT" ;; esac
    line=$(recorded edit "$path")
    original=$(printf '%s' "$path" | sha256sum | cut -c1-16)
    want_line "edit$TAB$path$TAB$(digest "$2")$TAB$original"
    was=$(digest "$path")
    if ! cmp -s "$2" "$path"; then
        note_change change "$path" "$4; without it: $STATE/originals/$original"
        [ -n "$DRY" ] || { save "$path" && put "$2" "$path"; } || fail "cannot write $path; these lines belong in it:
$(diff "$path" "$2" | sed -n 's/^> //p')"
    fi
    case $line in *"$TAB$was$TAB"*) return 0 ;; esac
    [ -n "$DRY" ] || { save "$STATE/originals/$original" && cp -a "$path" "$STATE/originals/$original" &&
        cat "$3" >"$STATE/originals/$original"; } || fail "cannot keep the original of $path"
}

want_tree() { # PATH NEW-or-empty WHY: a folder that is ours as a whole; NEW takes its place, empty keeps it
    want_line "tree$TAB$1"
    [ -n "$2" ] || return 0
    if [ -d "$1" ]; then note_change change "$1/" "$3"; else note_change create "$1/" "$3"; fi
    [ -n "$DRY" ] || { save "$1" tree && mv -T "$2" "$1"; } || fail "cannot put $1 in place"
}

put_back() { # PATH SHA256 ORIGINAL: the original when nobody else changed the file since, else the file without our lines
    [ -f "$1" ] || return 0
    if [ "$(digest "$1")" = "$2" ]; then
        cp "$STATE/originals/$3" "$TMP/original"
        note_change restore "$1" "as it was"
    else
        register strip "$1" >"$TMP/original" || fail "cannot take our lines out of $1"
        ! cmp -s "$TMP/original" "$1" || return 0
        note_change change "$1" "our lines taken out; others changed it since"
    fi
    [ -n "$DRY" ] || { save "$1" && put "$TMP/original" "$1"; } || fail "cannot write $1"
}

take_away() { # KIND PATH VALUE ORIGINAL: what a line of the manifest stands for
    case $1 in
        edit)
            put_back "$2" "$3" "$4"
            return 0
            ;;
        link) [ "$(readlink "$2" || :)" = "$3" ] || return 0 ;;
        dir)
            case $STATE in "$2"/*) return 0 ;; esac # with the state itself, at the very end
            [ -d "$2" ] || return 0
            if [ -z "$DRY" ] && [ -n "$(ls -A "$2")" ]; then
                say "leave $2/ (it holds files that are not ours)"
                return 0
            fi
            note_change remove "$2/"
            [ -n "$DRY" ] || { journal "rmdir$TAB$2" && rmdir "$2"; } || fail "cannot remove $2"
            return 0
            ;;
        tree) tree=1 ;;
    esac
    there "$2" || return 0
    note_change remove "$2"
    [ -n "$DRY" ] || { save "$2" ${tree:+tree} && rm -rf "$2"; } || fail "cannot remove $2"
    tree=''
}

sweep() { # take away what the last run declared and this one did not, newest first
    [ -f "$STATE/manifest" ] || return 0
    backwards "$STATE/manifest" >"$TMP/old"
    cut -f1,2 "$TMP/manifest" | sed 's/^edit/file/' >"$TMP/wanted"
    while IFS=$TAB read -r kind path value original <&7; do
        case $kind in edit) wanted="file$TAB$path" ;; *) wanted="$kind$TAB$path" ;; esac
        grep -qxF "$wanted" "$TMP/wanted" || take_away "$kind" "$path" "$value" "$original"
    done 7<"$TMP/old"
}

commit() {
    [ -z "$DRY" ] || return 0
    if [ -s "$TMP/manifest" ]; then
        cmp -s "$TMP/manifest" "$STATE/manifest" || {
            cp "$TMP/manifest" "$STATE/manifest.new" && sync "$STATE/manifest.new" && mv -f "$STATE/manifest.new" "$STATE/manifest"
        } || fail "cannot write $STATE/manifest"
        running=''
        rm -rf "$STATE/journal" "$STATE/undo"
    else # nothing is left of us: the state goes too, then the folders around it that we made
        grep "^dir$TAB" "$STATE/manifest" 2>/dev/null | cut -f2 >"$TMP/dirs" || :
        running=''
        rm -rf "$STATE"
        backwards "$TMP/dirs" >"$TMP/old"
        while read -r path; do
            case $STATE in "$path"/*) ;; *) continue ;; esac
            if rmdir "$path" 2>/dev/null; then say "remove $path/"; else say "leave $path/ (it holds files that are not ours)"; fi
        done <"$TMP/old"
    fi
}
