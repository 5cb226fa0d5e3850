// The LibTorch Stable ABI of torch 2.11: it compiles in a second, where ATen takes ten.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
