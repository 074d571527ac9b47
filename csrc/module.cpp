// The Python module fastvae._C: facts of the build, the instruction set in use, and a switch for tests. Loading it registers the C++
// operators.
#include <pybind11/pybind11.h>

#include <string>

#include "common/philox.h"
#include "cpu/codebook_kernels.h"
#include "cpu/isa.h"
#include "cpu/poison.h"

namespace py = pybind11;

namespace fastvae {
namespace {

int index_of(const std::string& name, const char* const* names, int count, const char* what) {
  for (int i = 0; i < count; ++i)
    if (name == names[i]) return i;
  throw py::value_error(std::string(what) + ": got '" + name + "', which is not one");
}

py::tuple instruction_sets() {
  py::list available;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_available(static_cast<Isa>(i))) available.append(kIsaNames[i]);
  return py::tuple(available);
}

void set_instruction_set(const std::string& name) {
  Isa isa = static_cast<Isa>(index_of(name, kIsaNames, kIsaCount, "instruction set"));
  if (!isa_available(isa)) throw py::value_error("instruction set: got '" + name + "', which this processor does not have");
  set_isa(isa);
}

const char* last_instruction_set(const std::string& family) {
  return last_run(static_cast<Family>(index_of(family, kFamilyNames, kFamilyCount, "family")));
}

py::tuple philox4x32_words(std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> c, std::tuple<uint32_t, uint32_t> k) {
  PhiloxWords words = philox4x32(std::get<0>(c), std::get<1>(c), std::get<2>(c), std::get<3>(c), std::get<0>(k), std::get<1>(k));
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
}

py::dict statistics_of_codebook(bool reset) {
  CodebookSearchCounts counts = codebook_statistics(reset);
  py::dict result;
  result["rows"] = counts.rows;
  result["rechecked"] = counts.rechecked;
  result["screened_again"] = counts.screened_again;
  return result;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["flags"] = FASTVAE_FLAGS;
  info["torch_target_version"] = FASTVAE_TORCH_TARGET;
  return info;
}

}  // namespace
}  // namespace fastvae

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of fastvae.";
  m.def("instruction_sets", &fastvae::instruction_sets, "The instruction sets that were compiled and that this processor has.");
  m.def("instruction_set", [] { return fastvae::kIsaNames[static_cast<int>(fastvae::isa_in_use())]; }, "The instruction set in use.");
  m.def("set_instruction_set", &fastvae::set_instruction_set, py::arg("name"), "Selects an instruction set for the whole process.");
  m.def("last_instruction_set", &fastvae::last_instruction_set, py::arg("family"),
        "The instruction set that the last call of a family ran with.");
  m.def("philox4x32", &fastvae::philox4x32_words, py::arg("counter"), py::arg("key"), "One block of random words.");
  m.def("codebook_statistics", &fastvae::statistics_of_codebook, py::arg("reset") = false,
        "Rows that all calls so far searched, those decided in float64, and those screened again in float32.");
  m.def("set_poison", &fastvae::set_poison, py::arg("on"), "Fills the tensors that operators allocate with NaN, for tests.");
  m.def("build_info", &fastvae::build_info, "Compiler, flags and the oldest torch that the library runs with.");
}
