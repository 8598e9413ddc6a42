#!/usr/bin/env bash
# Installs SLURM for tests/slurm where that is possible without asking: by root, on Debian or Ubuntu. Never fails: the tests
# say what is missing and are skipped then.
set -uo pipefail

programs=(slurmctld slurmd munged ip shellcheck)
missing=()
for program in "${programs[@]}"; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]})) || exit 0
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
  echo "tests/slurm will be skipped: ${missing[*]} not here (Debian: apt-get install slurm-wlm munge iproute2 shellcheck)"
  exit 0
fi
echo "installing slurm-wlm, munge, iproute2 and shellcheck for tests/slurm"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge iproute2 shellcheck; } >/tmp/install_slurm.$$ 2>&1; then
  echo "tests/slurm will be skipped, the packages could not be installed:"
  tail -n 3 /tmp/install_slurm.$$
fi
rm -f /tmp/install_slurm.$$
exit 0
