#!/usr/bin/env bash
# Fetches the glibc of Debian 11 and prints the folder of its libraries. Of a PROGRAM that this machine's linker made, it also looks
# whether that glibc has each function that the program takes from one, by name; by version it is a linker that must know it
# (docs/PLATFORMS.md). Usage: .ci/glibc.sh [PROGRAM]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FLOWTAPE_PLATFORMS:-target/platforms}
package=libc6_2.31-13+deb11u11_amd64.deb
sum=05f7264da867b37f4c5ce49266b558ea1e81e05a9464f623152fca70f3550282
libraries=$folder/glibc-2.31/lib/x86_64-linux-gnu

if ! [ -d "$libraries" ]; then
    mkdir -p "$folder"
    new=$(mktemp -d "$folder/glibc.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    # Debian moves what it no longer looks after.
    for site in deb archive; do
        curl --silent --show-error --fail --output "$new/deb" "https://$site.debian.org/debian/pool/main/g/glibc/$package" && break
    done
    sha256sum --check --quiet <<<"$sum  $new/deb"
    dpkg -x "$new/deb" "$new/files"
    mv --no-target-directory "$new/files" "$folder/glibc-2.31" 2>/dev/null || [ -d "$libraries" ] # another run was first
fi

if [ $# -gt 0 ]; then
    # What a program can do without is weak.
    wanted=$(objdump -T "$1" | sed -n '/ w /d; s/.*\*UND\*.*(GLIBC_[0-9.]*) *//p' | sort -u)
    [ "$wanted" ] || { echo "$1 takes nothing from a glibc: it is not the program that was meant" >&2 && exit 1; }
    # Older ones have these in what is linked into each program.
    linked_in='fstat|fstatat|lstat|mknod|mknodat|stat'
    missing=$(comm -23 <(echo "$wanted" | grep -vxE "($linked_in)(64)?") \
        <(objdump -T "$libraries"/lib{c,dl,m,pthread,rt,util}.so.* "$libraries"/ld-2.31.so | sed -n '/\*UND\*/d; s/.*GLIBC_[0-9.]*)\? *//p' | sort -u))
    [ -z "$missing" ] || { echo "$1 needs a glibc that is newer than 2.31, for:"$'\n'"$missing" >&2 && exit 1; }
fi
echo "$libraries"
