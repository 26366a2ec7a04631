#!/bin/sh
# Installs SMR on the node that this container runs on, or takes it away again; the container shares the node's processes (hostPID)
# and is privileged. Works inside the node's mount namespace, with the shell and the tools of the bundle: of the node nothing is
# needed but its kernel and its engine.
#
#   node.sh install       bring the node to this image's version and to SMR_OPTIONS; nothing happens when it is there already
#   node.sh uninstall     take everything away (the checkpoint images too with SMR_OPTIONS=--purge)
#   node.sh agent         run `smr agent` on the node until this container ends
#   node.sh wait          do nothing until this container ends
#
# SMR_OPTIONS   options of install.sh, split at blanks; its --prefix is the bundle's
# SMR_BUNDLE    where the bundle lies in this container (default: around this script)
set -eu

bundle=${SMR_BUNDLE:-$(cd "$(dirname "$0")/../.." && pwd)}
node=/proc/1/root

fail() {
    printf 'smr-node: %s\n' "$*" >&2
    exit 1
}

read -r _ _ prefix <"$bundle/format" || fail "$bundle is no bundle of install.sh"
copy=$(dirname "$prefix")/.smr-bundle # beside the prefix, which is install.sh's alone

[ -e "$node/proc/self" ] || fail "the node's processes are not to be seen: the pod needs hostPID, and the container privileged: true"
if [ "$(stat -c %d:%i "$node/")" = "$(stat -c %d:%i /)" ]; then
    fail "process 1 is this container's own: the pod needs hostPID: true"
fi

on_node() { # PROGRAM ARGUMENT...: in the node's mount namespace
    nsenter -t 1 -m -- "$@"
}

clean() { rm -rf "$node$copy" "$node$copy.new"; }

put_bundle() {
    clean
    mkdir -p "$node$(dirname "$copy")"
    if ! cp -a "$bundle" "$node$copy.new" || ! mv "$node$copy.new" "$node$copy"; then
        fail "cannot write $copy on the node: is it read-only, or full? A bundle for another place is made with --make-bundle --prefix"
    fi
}

case ${1-install} in
    install | uninstall)
        trap clean EXIT
        trap 'exit 143' TERM INT HUP
        put_bundle
        verb=''
        [ "$1" = install ] || verb=--uninstall
        # shellcheck disable=SC2086  # options are words
        on_node "$copy/python/bin/sh" "$copy/install.sh" --bundle "$copy" --prefix "$prefix" --restart $verb ${SMR_OPTIONS-}
        ;;
    agent)
        # The node does not see the pod's token but through a process of the pod.
        SMR_SERVICEACCOUNT=/proc/$$/root/var/run/secrets/kubernetes.io/serviceaccount
        export SMR_SERVICEACCOUNT
        on_node "$prefix/bin/smr" agent --listen 0.0.0.0:9464 &
        trap 'kill $!' TERM INT HUP
        wait $! || { status=$? && wait $! || exit "$status"; }
        ;;
    wait)
        trap 'exit 0' TERM INT HUP
        while :; do
            sleep 3600 &
            wait $!
        done
        ;;
    *) fail "'$1' is none of install, uninstall, agent, wait" ;;
esac
