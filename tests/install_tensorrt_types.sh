#!/usr/bin/env bash
# TensorRT's Python types, of both major versions, for machines without a GPU: NVIDIA's bindings are small, and of the
# libraries, gigabytes, need no more than these names to be imported. Nothing can be built with them.
set -euo pipefail

venv=$1
for version in 10.13.3.9 11.4.0.106; do
    directory=$venv/tensorrt-types/$version
    [ -e "$directory/tensorrt" ] && continue
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$directory" \
        "tensorrt-cu13-bindings==$version"
    for name in nvinfer nvinfer_plugin nvonnxparser; do
        library=lib$name.so.${version%%.*}
        cc -shared -fPIC -Wl,-soname,"$library" -o "$directory/$library" -x c - << 'END'
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
END
    done
    ln -sfn tensorrt_bindings "$directory/tensorrt"
done
