// The products of a chunk where i_dot adds them to lanes of int32 right away. Included by vector
// headers, inside a namespace of their own.
template <int kBits>
struct Dot {
  I sum;
  void start(int32_t from) { sum = i_set(from); }
  void add(Q w, A a) { sum = i_dot<kBits>(sum, w, a); }
  I total() const { return sum; }
};
