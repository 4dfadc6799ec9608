// Best-fit-decreasing packing in O(documents + seq_length): the fast twin of packing.py's pack_reference, which defines
// the result. Lengths are small integers, so sorting is counting, and "the smallest room that is at least this" is a
// search for the next set bit in a 64-ary tree of bitmaps (three levels at a window of 131,072 ids).
//
// Memory: 12 bytes per piece and 8 per window, which are the result; 4 per document are the caller's lengths. Beyond
// that, scratch for one buffer, of about 28 bytes per piece. Where texts may be cut, 12 more per piece: then a buffer
// ends with more pieces than it began with, and cannot be packed in its place.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Int32s = std::vector<std::int32_t>;
using Int64s = std::vector<std::int64_t>;

// A set of integers in [0, size) with "next member at or after" and "largest member" in O(log64 size).
class IntegerSet {
 public:
  explicit IntegerSet(std::int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void clear() {
    for (auto& level : levels_) std::fill(level.begin(), level.end(), 0);
  }

  void insert(std::uint32_t value) {
    for (auto& level : levels_) {
      level[value / 64] |= std::uint64_t{1} << (value % 64);
      value /= 64;
    }
  }

  void erase(std::uint32_t value) {
    for (auto& level : levels_) {
      level[value / 64] &= ~(std::uint64_t{1} << (value % 64));
      value /= 64;
      if (level[value] != 0) return;
    }
  }

  // The smallest member >= value, or -1.
  std::int64_t next(std::uint32_t value) const {
    for (std::size_t depth = 0; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      const std::size_t word = value / 64;
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

  // The largest member, or -1.
  std::int64_t largest() const {
    if (levels_.back()[0] == 0) return -1;
    std::uint32_t value = 0;
    for (std::size_t depth = levels_.size(); depth-- > 0;) {
      value = value * 64 + 63 - __builtin_clzll(levels_[depth][value]);
    }
    return value;
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;
};

// Rows of the result; packing.py reads them as uint32 [pieces, 3].
struct Piece {
  std::uint32_t document;
  std::int32_t start, length;
};

struct Span {
  std::int32_t start, end;
};

static_assert(sizeof(Piece) == 12 && sizeof(Span) == 8);

struct Documents {
  const std::int32_t* lengths;
  std::int64_t count;
  // Spans of `with_spans` documents, ascending; those of the k-th are spans[span_offsets[k] : span_offsets[k + 1]].
  const std::uint32_t* spanned;
  std::int64_t with_spans;
  const std::int64_t* span_offsets;
  const Span* spans;
};

struct Rules {
  std::int32_t seq_length, alignment;
  std::int32_t shortest_cut;  // 0: no document that fits into a window is cut
  std::uint32_t buffers;
  std::uint64_t seed;
};

struct Result {
  Int64s window_offsets{0};
  std::vector<Piece> pieces;
  Int64s skipped;
};

// The buffer that a document is drawn into: the high bits of SplitMix64's output function (Steele et al. 2014).
std::uint32_t draw_buffer(std::uint64_t seed, std::uint64_t document, std::uint32_t buffers) {
  std::uint64_t z = seed + (document + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return static_cast<std::uint32_t>(((z >> 32) * buffers) >> 32);
}

// Calls add(start, length) for each piece of a document longer than a window: cut as late as possible, outside spans.
// False where a span is longer than a window.
template <typename Add>
bool cut_long(std::int32_t length, const Span* first, const Span* last, std::int32_t seq_length, Add add) {
  if (std::any_of(first, last, [&](const Span& span) { return span.end - span.start > seq_length; })) return false;
  const Span* span = first;
  for (std::int64_t start = 0; start < length;) {
    std::int64_t end = std::min<std::int64_t>(start + seq_length, length);
    while (span != last && span->end < end) ++span;  // the first span that ends at or after the cut
    if (span != last && span->start < end && end < span->end) end = span->start;
    add(static_cast<std::int32_t>(start), static_cast<std::int32_t>(end - start));
    start = end;
  }
  return true;
}

// Calls visit(buffer, is_text, piece) for the pieces of all documents, in order; returns the documents skipped.
template <typename Visit>
Int64s visit_pieces(const Documents& documents, const Rules& rules, Visit visit) {
  Int64s skipped;
  std::int64_t k = 0;  // the first of the documents with spans that is not before this one
  for (std::int64_t d = 0; d < documents.count; ++d) {
    const auto document = static_cast<std::uint32_t>(d);
    const std::uint32_t buffer = rules.buffers == 1 ? 0 : draw_buffer(rules.seed, d, rules.buffers);
    while (k < documents.with_spans && documents.spanned[k] < document) ++k;
    const bool is_text = k == documents.with_spans || documents.spanned[k] != document;
    const std::int32_t length = documents.lengths[d];
    if (length <= rules.seq_length) {
      visit(buffer, is_text, Piece{document, 0, length});
      continue;
    }
    const Span* first = is_text ? nullptr : documents.spans + documents.span_offsets[k];
    const Span* last = is_text ? nullptr : documents.spans + documents.span_offsets[k + 1];
    const bool packed = cut_long(length, first, last, rules.seq_length, [&](std::int32_t start, std::int32_t size) {
      visit(buffer, is_text, Piece{document, start, size});
    });
    if (!packed) skipped.push_back(d);
  }
  return skipped;
}

// One buffer's pieces into windows. Lengths and rooms are counted in units of the alignment; windows with the same room
// form a stack: the one that came to it last is taken first.
class Windows {
 public:
  explicit Windows(const Rules& rules)
      : rules_(rules), capacity_(rules.seq_length / rules.alignment), rooms_(capacity_ + 1), top_(capacity_ + 1) {}

  // Packs the pieces [first, last) of `pool`, where the length of a text is negative if texts may be cut, and appends
  // the windows to `result`. Its pieces may be those of `pool` up to `first`.
  void pack(const Piece* first, const Piece* last, Result& result) {
    pieces_.clear();
    std::copy_if(first, last, std::back_inserter(pieces_), [](const Piece& piece) { return piece.length > 0; });
    const std::size_t texts = pieces_.size();
    for (; first != last; ++first) {
      if (first->length < 0) pieces_.push_back(Piece{first->document, first->start, -first->length});
    }
    rooms_.clear();
    std::fill(top_.begin(), top_.end(), -1);
    below_.clear();
    window_of_.assign(pieces_.size(), 0);
    sort_by_length(0, texts);
    for (const auto piece : order_) place(piece);
    sort_by_length(texts, pieces_.size());
    place_texts();
    append_to(result);
  }

 private:
  std::int32_t units(std::int32_t piece) const {
    return (pieces_[piece].length + rules_.alignment - 1) / rules_.alignment;
  }

  // order_ := the pieces [first, last), longest first, equal ones in their order.
  void sort_by_length(std::size_t first, std::size_t last) {
    order_.resize(last - first);
    if (first == last) return;
    counts_.assign(capacity_ + 1, 0);
    for (auto i = first; i < last; ++i) ++counts_[units(i)];
    std::int32_t before = 0;
    for (auto size = capacity_; size >= 0; --size) before += std::exchange(counts_[size], before);
    for (auto i = first; i < last; ++i) order_[counts_[units(i)]++] = static_cast<std::int32_t>(i);
  }

  // Into the fullest window with room, else into a new one.
  void place(std::int32_t piece) {
    if (!place_in_room(piece)) {
      window_of_[piece] = static_cast<std::int32_t>(below_.size());
      below_.push_back(-1);
      give_room(window_of_[piece], capacity_ - units(piece));
    }
  }

  bool place_in_room(std::int32_t piece) {
    const std::int32_t size = units(piece);
    const std::int64_t room = rooms_.next(size);
    if (room < 0) return false;
    window_of_[piece] = take_room(room);
    give_room(window_of_[piece], static_cast<std::int32_t>(room) - size);
    return true;
  }

  std::int32_t take_room(std::int64_t room) {
    const std::int32_t window = top_[room];
    top_[room] = below_[window];
    if (top_[room] < 0) rooms_.erase(static_cast<std::uint32_t>(room));
    return window;
  }

  void give_room(std::int32_t window, std::int32_t room) {
    if (room == 0) return;
    if (top_[room] < 0) rooms_.insert(room);
    below_[window] = top_[room];
    top_[room] = window;
  }

  // Whole where there is room; the others are cut into what room is left, and what then remains opens windows.
  void place_texts() {
    Int32s waiting, left;
    for (const auto piece : order_) {
      if (!place_in_room(piece)) waiting.push_back(piece);
    }
    for (const auto piece : waiting) {
      if (!cut_into_rooms(piece)) left.push_back(piece);
    }
    for (const auto piece : left) place(piece);
  }

  // Cuts heads off a text into the largest rooms until its rest has room; false where it has none in the end.
  bool cut_into_rooms(std::int32_t piece) {
    while (!place_in_room(piece)) {
      const std::int64_t room = rooms_.largest();
      const Piece whole = pieces_[piece];
      const std::int64_t most = (whole.length - rules_.shortest_cut) / rules_.alignment;
      const std::int64_t head = std::min(room, most) * rules_.alignment;
      if (room < 0 || head < rules_.shortest_cut) return false;
      const auto cut = static_cast<std::int32_t>(head);
      window_of_.push_back(take_room(room));
      give_room(window_of_.back(), static_cast<std::int32_t>(room) - cut / rules_.alignment);
      pieces_.push_back(Piece{whole.document, whole.start, cut});
      pieces_[piece].start += cut;
      pieces_[piece].length -= cut;
    }
    return true;
  }

  void append_to(Result& result) {
    const std::int64_t base = result.window_offsets.back();
    const std::size_t windows = below_.size();
    auto& next = below_;  // the stacks are done with
    std::fill(next.begin(), next.end(), 0);
    for (const auto window : window_of_) ++next[window];
    std::int32_t before = 0;
    for (auto& count : next) before += std::exchange(count, before);
    result.pieces.resize(std::max(result.pieces.size(), base + pieces_.size()));
    for (std::size_t i = 0; i < pieces_.size(); ++i) result.pieces[base + next[window_of_[i]]++] = pieces_[i];
    for (std::size_t window = 0; window < windows; ++window) {
      if (rules_.shortest_cut > 0) {  // media are before texts in the buffer, and heads after them
        const auto first = result.pieces.begin() + result.window_offsets.back();
        std::sort(first, result.pieces.begin() + base + next[window], [](const Piece& a, const Piece& b) {
          return a.document != b.document ? a.document < b.document : a.start < b.start;
        });
      }
      result.window_offsets.push_back(base + next[window]);
    }
  }

  const Rules& rules_;
  const std::int32_t capacity_;
  IntegerSet rooms_;
  Int32s top_;     // room -> window on top of its stack
  Int32s below_;   // window -> next window of the same stack
  Int32s counts_;  // scratch of the sort
  Int32s order_;
  Int32s window_of_;
  std::vector<Piece> pieces_;
};

Result pack_documents(const Documents& documents, const Rules& rules) {
  Result result;
  Int64s ends(rules.buffers + 1, 0);  // first the number of pieces of each buffer, then where the next of them goes
  result.skipped = visit_pieces(documents, rules, [&](std::uint32_t buffer, bool, const Piece&) { ++ends[buffer + 1]; });
  for (std::uint32_t buffer = 0; buffer < rules.buffers; ++buffer) ends[buffer + 1] += ends[buffer];
  const std::int64_t total = ends.back();
  const bool cuts = rules.shortest_cut > 0;
  std::vector<Piece> pool(total);
  visit_pieces(documents, rules, [&](std::uint32_t buffer, bool is_text, Piece piece) {
    if (cuts && is_text) piece.length = -piece.length;
    pool[ends[buffer]++] = piece;
  });
  // Reserved memory costs nothing before it is written, and a vector that grows is copied. A cut fills a window or ends
  // a text, so that there are at most twice as many pieces with cuts.
  result.window_offsets.reserve(total + 1);
  Windows windows(rules);
  std::int64_t first = 0;
  if (cuts) {
    result.pieces.reserve(2 * total);
    for (std::uint32_t buffer = 0; buffer < rules.buffers; first = ends[buffer++]) {
      windows.pack(pool.data() + first, pool.data() + ends[buffer], result);
    }
  } else {
    result.pieces.swap(pool);
    for (std::uint32_t buffer = 0; buffer < rules.buffers; first = ends[buffer++]) {
      windows.pack(result.pieces.data() + first, result.pieces.data() + ends[buffer], result);
    }
  }
  return result;
}

// A numpy array of `T` that keeps the vector alive.
template <typename T, typename Element>
py::array_t<T> to_numpy(std::vector<Element>&& values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<Element>(std::move(values));
  py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<Element>*>(pointer); });
  return py::array_t<T>(std::move(shape), reinterpret_cast<const T*>(owned->data()), owner);
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple pack(const Array<std::int32_t>& lengths, const Array<std::uint32_t>& spanned,
               const Array<std::int64_t>& span_offsets, const Array<std::int32_t>& span_bounds,
               std::int32_t seq_length, std::int32_t alignment, std::int32_t shortest_cut, std::uint32_t buffers,
               std::uint64_t seed) {
  const Documents documents{lengths.data(),      lengths.size(),
                            spanned.data(),      spanned.size(),
                            span_offsets.data(), reinterpret_cast<const Span*>(span_bounds.data())};
  const Rules rules{seq_length, alignment, shortest_cut, buffers, seed};
  Result result;
  {
    py::gil_scoped_release release;
    result = pack_documents(documents, rules);
  }
  const auto offsets = static_cast<py::ssize_t>(result.window_offsets.size());
  const auto pieces = static_cast<py::ssize_t>(result.pieces.size());
  const auto skipped = static_cast<py::ssize_t>(result.skipped.size());
  return py::make_tuple(to_numpy<std::int64_t>(std::move(result.window_offsets), {offsets}),
                        to_numpy<std::uint32_t>(std::move(result.pieces), {pieces, 3}),
                        to_numpy<std::int64_t>(std::move(result.skipped), {skipped}));
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "Best-fit-decreasing packing; see megatron_ext/data/packing.py.";
  module.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("spanned").noconvert(),
             py::arg("span_offsets").noconvert(), py::arg("span_bounds").noconvert(), py::arg("seq_length"),
             py::arg("alignment"), py::arg("shortest_cut"), py::arg("buffers"), py::arg("seed"));
}
