# Shared by tests/lab/setup, build-kernel and build-root; sourced, not run.
# shellcheck shell=bash
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${VFIOD_LAB_CACHE:-$repo/.lab}
lab=${VFIOD_LAB:-$repo/../shared/lab}

note() { echo "lab: $*" >&2; }
die() { echo "lab: error: $*" >&2; exit 1; }

# lab_kernel ARCHITECTURE: the kernel to boot: the environment's, the ready one beside the
# repository, or the one built here. Keep in step with find_kernel() of places.py.
lab_kernel() {
    local path named=VFIOD_LAB_KERNEL
    [ "$1" = x86_64 ] || named=VFIOD_LAB_KERNEL_${1^^}
    for path in "${!named:-}" "$lab/$1/bzImage" "$cache/$1/bzImage"; do
        if [ -n "$path" ] && [ -r "$path" ]; then echo "$path"; return 0; fi
    done
    return 1
}

codename() { . /etc/os-release && echo "${VERSION_CODENAME:-}"; }

# What the scripts leave behind when they end, however they end: nothing.
temporary=()
trap '[ ${#temporary[@]} = 0 ] || rm -rf "${temporary[@]}"' EXIT

# need_root_and_apt PACKAGE...: or say what to install by hand.
need_root_and_apt() {
    local why=""
    [ "$(codename)" = bookworm ] || why="this is not Debian bookworm"
    command -v apt-get >/dev/null || why="there is no apt-get here"
    [ "$(id -u)" = 0 ] || why="this is not root"
    [ -z "$why" ] || die "$why, so nothing is installed. Missing (QEMU must be 10.0 or newer): $*"
}

# The address of the Debian archive this machine uses, from its own sources (deb822 or
# one-line): no address is ever written down here.
main_archive() {
    # indextargets prints what apt itself made of them.
    apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT) $(CREATED_BY)' |
        awk -v suite="$(codename)" '$2 == suite && $3 == "main" && $4 == "Packages" && !site {site = $1} END {print site}'
}

# apt_prepare SUITE: from here on, apt_lab is apt-get with SUITE beside the machine's own
# sources, in a temporary configuration; the machine's stays as it is.
apt_state=""
apt_prepare() {
    apt_foreign_options=()
    local suite=$1 site keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    site=$(main_archive)
    [ -n "$site" ] || die "no Debian $(codename) main archive in this machine's apt sources"
    apt_state=$(mktemp -d)
    temporary+=("$apt_state")
    mkdir -p "$apt_state/parts" "$apt_state/lists/partial"
    cp -a /etc/apt/sources.list.d/. "$apt_state/parts/" 2>/dev/null || true
    [ ! -f /etc/apt/sources.list ] || cp /etc/apt/sources.list "$apt_state/parts/zz-main.list"
    printf '%s\n' "Types: deb" "URIs: $site" "Suites: $suite" "Components: main" "Signed-By: $keyring" \
        >"$apt_state/parts/zz-vfiod-lab.sources"
    chmod 755 "$apt_state" "$apt_state"/* # apt reads it as its own user
    apt_lab update -qq >&2
}

# apt_foreign SUITE ARCHITECTURE: from here on, apt_lab is apt-get on a machine of that architecture
# with nothing installed: "install --download-only" brings packages with all they depend on, into
# $apt_archives.
apt_archives="" apt_foreign_options=()
apt_foreign() {
    local suite=$1 architecture=$2 site keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    site=$(main_archive)
    [ -n "$site" ] || die "no Debian $(codename) main archive in this machine's apt sources"
    apt_state=$(mktemp -d)
    temporary+=("$apt_state")
    apt_archives=$apt_state/archives
    mkdir -p "$apt_state/parts" "$apt_state/lists/partial" "$apt_archives/partial"
    : >"$apt_state/status"
    printf '%s\n' "Types: deb" "URIs: $site" "Suites: $suite" "Components: main" \
        "Architectures: $architecture" "Signed-By: $keyring" >"$apt_state/parts/lab.sources"
    apt_foreign_options=(-o "APT::Architecture=$architecture" -o "APT::Architectures=" -o "APT::Architectures::=$architecture"
        -o "Dir::State::status=$apt_state/status" -o "Dir::Cache::archives=$apt_archives" -o "Acquire::Retries=3")
    chmod 755 "$apt_state" "$apt_state"/* # apt reads it as its own user
    apt_lab update -qq >&2
}

# Where apt keeps what it works with. Its binary caches are switched off: they would hold the
# temporary suite and outlive it.
apt_options() {
    printf '%s\n' -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt_state/parts" \
        -o Dir::State::Lists="$apt_state/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        "${apt_foreign_options[@]}"
}

apt_lab() {
    local options
    mapfile -t options < <(apt_options)
    DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" "$@"
}

apt_lab_search() {
    local options
    mapfile -t options < <(apt_options)
    apt-cache "${options[@]}" search --names-only "$1"
}
