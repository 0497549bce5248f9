#!/usr/bin/env bash
# Run a command where a Docker engine with Compose answers: one that runs already, or one that is started for it.
#
#     with_engine.sh COMMAND...
#
# To start one, be root on Debian: what it consists of is installed with apt-get. It is stopped when the command has ended,
# and leaves no bridge and no firewall rule; its images stay. Where the base image of docker/Dockerfile cannot be pulled, one
# of its name is made from Debian's packages, in which pip trusts the certificates that this machine trusts.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/allreduce_spark/docker
work=$(mktemp --directory)
engine=

check_machine() {
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "No Docker engine with Compose answers here, and only root on Debian can start one: install and start Docker." >&2
        exit 1
    fi
}

install_packages() {
    check_machine
    apt-get update --quiet --quiet
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends "$@" >/dev/null
}

# Where this machine has its own Debian packages from.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(CODENAME)' 'Created-By: Packages' \
        | awk -v release="$(. /etc/os-release && echo "$VERSION_CODENAME")" '$2 == "main" && $3 == release { print $1; exit }'
}

# Compose 2 is younger than Debian 12, but the plugin of Debian 13 runs there.
fetch_compose() {
    check_machine
    local apt=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$cache/cli-plugins"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) trixie main" \
        >"$work/sources.list"
    apt-get "${apt[@]}" update --quiet --quiet
    (cd "$work" && apt-get "${apt[@]}" download --quiet --quiet docker-compose && dpkg -x docker-compose_*.deb compose)
    install "$work/compose/usr/libexec/docker/cli-plugins/docker-compose" "$cache/cli-plugins/"
}

start_engine() {
    forward=$(iptables --list-rules FORWARD | head --lines 1 | cut --delimiter ' ' --fields 3)
    ip_forward=$(</proc/sys/net/ipv4/ip_forward)
    dockerd >"$work/dockerd.log" 2>&1 &
    engine=$!
    for _ in {1..120}; do
        docker info >/dev/null 2>&1 && return
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.5
    done
    tail --lines 20 "$work/dockerd.log" >&2
    exit 1
}

# An engine that ends leaves its bridge, and its rules and the policy that it has given to the firewall.
stop_engine() {
    if [[ -n $engine ]]; then
        kill "$engine" || true
        wait "$engine" || true
        ip link delete docker0 || true
        iptables-save | grep --invert-match --extended-regexp 'DOCKER|docker0' \
            | sed "s/^:FORWARD [A-Z]*/:FORWARD $forward/" | iptables-restore
        echo "$ip_forward" >/proc/sys/net/ipv4/ip_forward
    fi
    rm --recursive --force "$work"
}

make_base() {
    local name=$1 root=$work/root release=${1#*:}
    install_packages ca-certificates debootstrap
    debootstrap --variant=minbase "${release%%-*}" "$root" "$(mirror)" >/dev/null
    # Slim, as Debian's own images are.
    printf 'path-exclude=/usr/share/%s/*\n' doc man >"$root/etc/dpkg/dpkg.cfg.d/slim"
    rm --recursive --force "$root"/usr/share/{doc,man} "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/pip-certificates.crt"
    printf '[global]\ncert = /etc/pip-certificates.crt\n' >"$root/etc/pip.conf"
    tar --directory "$root" --create . | docker import - "$name" >/dev/null
}

trap stop_engine EXIT
if ! docker info >/dev/null 2>&1; then
    command -v dockerd >/dev/null || install_packages docker.io
    start_engine
fi
if ! docker compose version >/dev/null 2>&1; then
    [[ -x $cache/cli-plugins/docker-compose ]] || fetch_compose
    export DOCKER_CONFIG=$cache
fi
base=$(awk '$1 == "FROM" { print $2; exit }' "$here/../../docker/Dockerfile")
if ! docker image inspect "$base" >/dev/null 2>&1 && ! timeout 300 docker pull --quiet "$base"; then
    make_base "$base"
fi
"$@"
