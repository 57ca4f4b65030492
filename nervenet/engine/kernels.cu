// Operations on a GPU that walk over memory once, where plain CuPy operations would walk several times.
//
// A kernel is a function that a GPU runs in very many threads at once. Threads come in blocks of equal size, and each finds out which
// one it is from the number of its block and its own number in it. Here every thread answers for one value of the result, reads what
// that value depends on, and writes it: no two threads write the same place, so none has to wait for another, and no memory has to be
// shared between the threads of a block. Neighbouring threads answer for neighbouring channels of a pixel, so a group of them reads
// neighbouring places of memory, which arrive together.
//
// The last block is seldom full: threads past the end have nothing to do.
//
// Arrays are float32, but for argmax, which has bytes, and lie without gaps in the order (N, H, W, C); `size` is the number of values of the result.

#define THREAD_NUMBER (blockIdx.x * (long long)blockDim.x + threadIdx.x)

// y = max(x·slope + shift, 0): the norm of a batch, once its mean and variance are known, and ReLU. slope, shift (C,).
extern "C" __global__ void normalize_relu(const float *x, const float *slope, const float *shift, float *y, int C, long long size)
{
    long long i = THREAD_NUMBER;
    if (i >= size) return;
    int c = i % C;                                          // which channel this value belongs to
    float value = x[i] * slope[c] + shift[c];
    y[i] = value < 0 ? 0 : value;                           // not fmaxf, which would make 0 of NaN
}

// The largest of each k×k window, and which of its pixels that was, counted row by row from 0: x (N, H, W, C), y and argmax
// (N, H/k, W/k, C). Of equals it is the first.
extern "C" __global__ void max_pool(const float *x, float *y, unsigned char *argmax, int H, int W, int C, int k, long long size)
{
    long long i = THREAD_NUMBER;
    if (i >= size) return;
    int H_out = H / k, W_out = W / k;
    int c = i % C, column = i / C % W_out, row = i / C / W_out % H_out;
    long long n = i / C / W_out / H_out;
    const float *corner = x + ((n * H + row * k) * W + column * k) * C + c;
    float largest = corner[0];
    int place = 0;
    for (int p = 1; p < k * k; p++) {
        float value = corner[((long long)(p / k) * W + p % k) * C];
        if (value > largest || (value != value && largest == largest)) {    // NaN, the only value unequal to itself, is kept
            largest = value;
            place = p;
        }
    }
    y[i] = largest;
    argmax[i] = place;
}

// dx (N, H, W, C) from dy and argmax (N, H/k, W/k, C). A thread answers for one value of dx, not of dy: so each is written once, and
// those that no window covers get their 0 from the same line.
extern "C" __global__ void max_pool_backward(const float *dy, const unsigned char *argmax, float *dx,
                                             int H, int W, int C, int k, long long size)
{
    long long i = THREAD_NUMBER;
    if (i >= size) return;
    int H_out = H / k, W_out = W / k;
    int c = i % C, column = i / C % W, row = i / C / W % H;
    long long n = i / C / W / H;
    float gradient = 0;
    if (row < H_out * k && column < W_out * k) {
        long long window = ((n * H_out + row / k) * W_out + column / k) * C + c;
        if (argmax[window] == row % k * k + column % k) gradient = dy[window];
    }
    dx[i] = gradient;
}

// One step of Adam for all parameters, which lie in one vector, as do their gradients g, means m and mean squares v; see
// `optim.Adam` for the rule, and for how η and ε come to hold both corrections.
extern "C" __global__ void adam(float *w, const float *g, float *m, float *v, float beta1, float beta2, float one_minus_beta1,
                                float one_minus_beta2, float eta, float epsilon, long long size)
{
    long long i = THREAD_NUMBER;
    if (i >= size) return;
    m[i] = beta1 * m[i] + one_minus_beta1 * g[i];
    v[i] = beta2 * v[i] + one_minus_beta2 * g[i] * g[i];
    w[i] -= eta * m[i] / (sqrtf(v[i]) + epsilon);
}
