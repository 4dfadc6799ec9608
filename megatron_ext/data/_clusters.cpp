// Which things belong together: connected components of a graph, given by its edges, or by hashes of which those within
// a distance are neighbours. near_duplicates.py and held_out.py say what for.
//
// Memory: 4 bytes per node; beyond that, for hashes, 32 bytes per hash while they are sorted.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Components whose root is their smallest node.
class Components {
 public:
  explicit Components(std::size_t nodes) : parents_(nodes) {
    if (nodes > UINT32_MAX) throw std::invalid_argument("more than 2^32 - 1 nodes");
    std::iota(parents_.begin(), parents_.end(), 0u);
  }

  std::uint32_t root(std::uint32_t node) {
    while (parents_[node] != node) {
      parents_[node] = parents_[parents_[node]];
      node = parents_[node];
    }
    return node;
  }

  void join(std::uint32_t one, std::uint32_t two) {
    one = root(one);
    two = root(two);
    if (one < two) std::swap(one, two);
    parents_[one] = two;
  }

  std::vector<std::uint32_t> roots() && {
    for (std::size_t node = 0; node < parents_.size(); ++node) parents_[node] = root(static_cast<std::uint32_t>(node));
    return std::move(parents_);
  }

 private:
  std::vector<std::uint32_t> parents_;
};

struct Hash {
  std::uint64_t bits;
  std::uint32_t node;
  std::uint32_t key;  // the first 32 of the bits that are compared
};

// The bits of `value` under `mask`, closed up. Of more than 32 the lowest: hashes that agree in those are compared, too.
std::uint32_t gather(std::uint64_t value, std::uint64_t mask) {
  std::uint32_t gathered = 0;
  for (int place = 0; mask != 0 && place < 32;) {
    const int begin = __builtin_ctzll(mask);
    const std::uint64_t rest = ~(mask >> begin);
    const int width = rest == 0 ? 64 : __builtin_ctzll(rest);  // of the lowest run of ones
    const std::uint64_t run = width == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << width) - 1;
    gathered |= static_cast<std::uint32_t>((value >> begin & run) << place);
    mask &= ~(run << begin);
    place += width;
  }
  return gathered;
}

// Sorts by key, `Digits` at a time, from the lowest; equal ones stay in their order.
void sort_by_key(std::vector<Hash>& hashes, std::vector<Hash>& scratch, int bits) {
  constexpr int Digits = 11;
  std::array<std::size_t, 1 << Digits> places;
  for (int shift = 0; shift < bits; shift += Digits) {
    const auto digit = [shift](const Hash& hash) { return hash.key >> shift & ((1u << Digits) - 1); };
    places.fill(0);
    for (const auto& hash : hashes) ++places[digit(hash)];
    std::size_t before = 0;
    for (auto& place : places) before += std::exchange(place, before);
    for (const auto& hash : hashes) scratch[places[digit(hash)]++] = hash;
    hashes.swap(scratch);
  }
}

// One instruction counts bits where the processor has it, which nearly all have, and x86-64 by itself does not promise.
#if defined(__x86_64__) && defined(__GLIBC__)
#define COUNTS_BITS __attribute__((target_clones("popcnt", "default")))
#else
#define COUNTS_BITS
#endif

// Joins all that are near each other among hashes of one key.
COUNTS_BITS void join_near(const Hash* first, const Hash* last, int distance, Components& components) {
  for (; first != last; ++first) {
    for (const Hash* other = first + 1; other != last; ++other) {
      if (__builtin_popcountll(first->bits ^ other->bits) <= distance) components.join(first->node, other->node);
    }
  }
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

py::array_t<std::uint32_t> to_numpy(std::vector<std::uint32_t>&& values) {
  auto* owned = new std::vector<std::uint32_t>(std::move(values));
  py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<std::uint32_t>*>(pointer); });
  return py::array_t<std::uint32_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::array_t<std::uint32_t> near_roots(const Array<std::uint64_t>& values, const Array<std::uint64_t>& masks,
                                      int distance) {
  const std::uint64_t* bits = values.data();
  const auto count = static_cast<std::size_t>(values.size());
  const std::vector<std::uint64_t> choices(masks.data(), masks.data() + masks.size());
  std::vector<std::uint32_t> roots;
  {
    py::gil_scoped_release release;
    Components components(count);
    std::vector<Hash> hashes(count), scratch(count);
    for (const auto mask : choices) {
      for (std::size_t node = 0; node < count; ++node) {
        hashes[node] = Hash{bits[node], static_cast<std::uint32_t>(node), gather(bits[node], mask)};
      }
      sort_by_key(hashes, scratch, std::min(32, __builtin_popcountll(mask)));
      for (const Hash *first = hashes.data(), *end = first + count; first != end;) {
        const Hash* last = first;
        while (last != end && last->key == first->key) ++last;
        join_near(first, last, distance, components);
        first = last;
      }
    }
    roots = std::move(components).roots();
  }
  return to_numpy(std::move(roots));
}

py::array_t<std::uint32_t> edge_roots(std::size_t nodes, const Array<std::int64_t>& ones,
                                      const Array<std::int64_t>& others) {
  const std::int64_t *one = ones.data(), *other = others.data();
  const auto edges = static_cast<std::size_t>(ones.size());
  std::vector<std::uint32_t> roots;
  {
    py::gil_scoped_release release;
    Components components(nodes);
    for (std::size_t edge = 0; edge < edges; ++edge) {
      components.join(static_cast<std::uint32_t>(one[edge]), static_cast<std::uint32_t>(other[edge]));
    }
    roots = std::move(components).roots();
  }
  return to_numpy(std::move(roots));
}

}  // namespace

PYBIND11_MODULE(_clusters, module) {
  module.doc() = "Connected components; see megatron_ext/data/near_duplicates.py and held_out.py.";
  module.def("near_roots", &near_roots, py::arg("hashes").noconvert(), py::arg("masks").noconvert(),
             py::arg("distance"));
  module.def("edge_roots", &edge_roots, py::arg("nodes"), py::arg("ones").noconvert(), py::arg("others").noconvert());
}
