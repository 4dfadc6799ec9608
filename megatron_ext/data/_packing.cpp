// Best-fit-decreasing packing in O(documents + seq_length): the fast twin of packing.py's pack_reference, which defines
// the result. Lengths are small integers, so sorting is counting, and "the smallest room that is at least this" is a
// search for the next set bit in a 64-ary tree of bitmaps (three levels at a window of 131,072 ids).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace {

using Int64s = std::vector<std::int64_t>;

// A set of integers in [0, size) with "next member at or after" in O(log64 size).
class IntegerSet {
 public:
  explicit IntegerSet(std::int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(std::int64_t value) {
    for (auto& level : levels_) {
      level[value / 64] |= std::uint64_t{1} << (value % 64);
      value /= 64;
    }
  }

  void erase(std::int64_t value) {
    for (auto& level : levels_) {
      level[value / 64] &= ~(std::uint64_t{1} << (value % 64));
      value /= 64;
      if (level[value] != 0) return;
    }
  }

  // The smallest member >= value, or -1.
  std::int64_t next(std::int64_t value) const {
    for (std::size_t depth = 0; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      const auto word = static_cast<std::size_t>(value / 64);
      if (word >= level.size()) return -1;
      const std::uint64_t rest = level[word] >> (value % 64);
      if (rest != 0) {
        value += __builtin_ctzll(rest);
        while (depth-- > 0) value = value * 64 + __builtin_ctzll(levels_[depth][value]);
        return value;
      }
      value = value / 64 + 1;  // nothing here: look for the next non-empty word one level up
    }
    return -1;
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;
};

struct Pieces {
  Int64s document, start, length;
  Int64s skipped;

  void add(std::int64_t d, std::int64_t s, std::int64_t n) {
    document.push_back(d);
    start.push_back(s);
    length.push_back(n);
  }
};

struct Span {
  std::int32_t start, end;
};

// Pieces of a document longer than a window: cut as late as possible, outside spans.
void cut_long(std::int64_t document, std::int64_t length, const Span* first, const Span* last, std::int64_t seq_length,
              Pieces& pieces) {
  if (std::any_of(first, last, [&](const Span& span) { return span.end - span.start > seq_length; })) {
    pieces.skipped.push_back(document);
    return;
  }
  const Span* span = first;
  for (std::int64_t start = 0; start < length;) {
    std::int64_t end = std::min(start + seq_length, length);
    while (span != last && span->end < end) ++span;  // the first span that ends at or after the cut
    if (span != last && span->start < end && end < span->end) end = span->start;
    pieces.add(document, start, end - start);
    start = end;
  }
}

Pieces cut(const std::int64_t* lengths, std::int64_t count, const std::int64_t* offsets, const Span* spans,
           std::int64_t seq_length) {
  Pieces pieces;
  for (auto* column : {&pieces.document, &pieces.start, &pieces.length}) column->reserve(count);
  for (std::int64_t document = 0; document < count; ++document) {
    if (lengths[document] <= seq_length) {
      pieces.add(document, 0, lengths[document]);
    } else {
      cut_long(document, lengths[document], spans + offsets[document], spans + offsets[document + 1], seq_length,
               pieces);
    }
  }
  return pieces;
}

// Indices that sort keys in [0, bound) ascending, equal keys in their order; offsets[k] = first place of key k.
Int64s counting_sort(const Int64s& keys, std::int64_t bound, Int64s& offsets) {
  offsets.assign(bound + 1, 0);
  for (const auto key : keys) ++offsets[key + 1];
  for (std::int64_t key = 0; key < bound; ++key) offsets[key + 1] += offsets[key];
  Int64s next(offsets.begin(), offsets.end() - 1);
  Int64s order(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) order[next[keys[i]]++] = static_cast<std::int64_t>(i);
  return order;
}

// The window of each piece. Lengths and rooms are counted in units of the alignment; windows with the same room form a
// stack: the one that came to it last is taken first.
Int64s assign_windows(const Int64s& piece_length, std::int64_t seq_length, std::int64_t alignment,
                      std::int64_t& window_count) {
  const std::int64_t capacity = seq_length / alignment;
  Int64s slack(piece_length.size());  // capacity - units: ascending slack is decreasing length
  for (std::size_t i = 0; i < slack.size(); ++i) slack[i] = capacity - (piece_length[i] + alignment - 1) / alignment;
  Int64s ignored;
  const Int64s order = counting_sort(slack, capacity + 1, ignored);

  IntegerSet rooms(capacity + 1);
  Int64s top(capacity + 1, -1);  // room -> window on top of its stack
  Int64s below;                  // window -> next window of the same stack
  Int64s window_of(piece_length.size());
  for (const auto piece : order) {
    const std::int64_t units = capacity - slack[piece];
    std::int64_t room = rooms.next(units);
    std::int64_t window;
    if (room < 0) {
      room = capacity;
      window = static_cast<std::int64_t>(below.size());
      below.push_back(-1);
    } else {
      window = top[room];
      top[room] = below[window];
      if (top[room] < 0) rooms.erase(room);
    }
    window_of[piece] = window;
    if (room -= units; room > 0) {
      if (top[room] < 0) rooms.insert(room);
      below[window] = top[room];
      top[room] = window;
    }
  }
  window_count = static_cast<std::int64_t>(below.size());
  return window_of;
}

Int64s gather(const Int64s& values, const Int64s& order) {
  Int64s result(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) result[i] = values[order[i]];
  return result;
}

// A numpy array that keeps the vector alive.
py::array_t<std::int64_t> to_numpy(Int64s&& values) {
  auto* owned = new Int64s(std::move(values));
  py::capsule owner(owned, [](void* pointer) { delete static_cast<Int64s*>(pointer); });
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple pack(const Array<std::int64_t>& lengths, const Array<std::int64_t>& span_offsets,
               const Array<std::int32_t>& span_bounds, std::int64_t seq_length, std::int64_t alignment) {
  static_assert(sizeof(Span) == 2 * sizeof(std::int32_t));
  Pieces pieces;
  Int64s order, window_offsets;
  {
    const auto count = static_cast<std::int64_t>(lengths.size());
    const auto* spans = reinterpret_cast<const Span*>(span_bounds.data());
    py::gil_scoped_release release;
    pieces = cut(lengths.data(), count, span_offsets.data(), spans, seq_length);
    std::int64_t window_count = 0;
    const Int64s window_of = assign_windows(pieces.length, seq_length, alignment, window_count);
    order = counting_sort(window_of, window_count, window_offsets);
    for (auto* column : {&pieces.document, &pieces.start, &pieces.length}) *column = gather(*column, order);
  }
  return py::make_tuple(to_numpy(std::move(window_offsets)), to_numpy(std::move(pieces.document)),
                        to_numpy(std::move(pieces.start)), to_numpy(std::move(pieces.length)),
                        to_numpy(std::move(pieces.skipped)));
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "Best-fit-decreasing packing; see megatron_ext/data/packing.py.";
  module.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("span_offsets").noconvert(),
             py::arg("span_bounds").noconvert(), py::arg("seq_length"), py::arg("alignment"));
}
