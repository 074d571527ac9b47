// A switch for tests. It includes nothing of torch, so that module.cpp, which includes pybind11, sees no pybind11 that torch bundles.
#pragma once

namespace fastvae {

// Fills the CPU tensors that operators allocate with NaN, so that an element no kernel writes shows in a test.
void set_poison(bool on);

}  // namespace fastvae
