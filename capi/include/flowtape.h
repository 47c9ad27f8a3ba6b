// Flowtape's trainer for programs in C. Made of capi/src by cbindgen, which a test compares: do not edit.

#ifndef FLOWTAPE_H
#define FLOWTAPE_H

#include <stddef.h>
#include <stdint.h>

// The version of this interface. It grows when a function or a struct changes in a way that old callers would not survive.
#define FLOWTAPE_ABI_VERSION 1

// What a call came to.
typedef enum FlowtapeStatus {
  // It did what it says.
  FLOWTAPE_STATUS_OK = 0,
  // It failed; `flowtape_last_error` says why.
  FLOWTAPE_STATUS_ERROR = 1,
  // It was cancelled, and did not get to the end.
  FLOWTAPE_STATUS_CANCELLED = 2,
} FlowtapeStatus;

// What a tensor's elements are, in the machine's order of bytes.
typedef enum FlowtapeDtype {
  // 32-bit floats.
  FLOWTAPE_DTYPE_F32 = 0,
  // The upper half of 32-bit floats.
  FLOWTAPE_DTYPE_BF16 = 1,
  // 16-bit floats.
  FLOWTAPE_DTYPE_F16 = 2,
  // 64-bit floats.
  FLOWTAPE_DTYPE_F64 = 3,
  // 32-bit unsigned integers.
  FLOWTAPE_DTYPE_U32 = 4,
} FlowtapeDtype;

// What is saved or loaded.
typedef enum FlowtapeContent {
  // Everything: a run that is loaded goes on as if it had never stopped.
  FLOWTAPE_CONTENT_CHECKPOINT = 0,
  // The weights that are sampled with, as the safetensors file that diffusers opens.
  FLOWTAPE_CONTENT_WEIGHTS = 1,
} FlowtapeContent;

// A model in training. Its functions may be called from any thread; one that works waits for another that does, but for
// `flowtape_trainer_cancel`, which returns at once.
typedef struct FlowtapeTrainer FlowtapeTrainer;

// Bytes that the library made. They are freed by `flowtape_bytes_free`, not by `free`.
typedef struct FlowtapeBytes {
  // The first one.
  uint8_t *data;
  // How many.
  size_t len;
} FlowtapeBytes;

// What a step came to.
typedef struct FlowtapeMetrics {
  // Optimiser steps done.
  uint64_t step;
  // The epoch, where the recipe's own data is trained on.
  uint64_t epoch;
  // The mean loss of its samples.
  double loss;
  // The learning rate.
  double lr;
  // The norm of all gradients together.
  double grad_norm;
  // Seconds that it took.
  double step_time;
  // Samples a second.
  double samples_per_second;
  // Memory of tensors behind it, in 2^30 bytes.
  double memory_gb;
} FlowtapeMetrics;

// A tensor of the caller's, row-major and without gaps. It is copied; nothing is kept of it after a call.
typedef struct FlowtapeTensor {
  // `latents` (`[B, C, H, W]` or `[B, C, F, H, W]`), or what the model's adapter reads, such as `text_embeddings`; of a list of
  // tensors one is `name.0`, the next `name.1`.
  const char *name;
  // The elements; they need no alignment.
  const void *data;
  // A `FlowtapeDtype`.
  uint32_t dtype;
  // Sizes.
  const size_t *dims;
  // How many sizes.
  size_t rank;
} FlowtapeTensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the interface that the library has; the header's is `FLOWTAPE_ABI_VERSION`.
uint32_t flowtape_abi_version(void);

// The text of the last error of this thread, in UTF-8; empty where there was none. It stays until the thread's next call that fails.
const char *flowtape_last_error(void);

// Frees bytes that the library made; null is none.
//
// # Safety
// They are as the library gave them, and were not freed.
void flowtape_bytes_free(struct FlowtapeBytes bytes);

// A trainer of a recipe (the text of its YAML, or JSON) on the data that it names. `abi_version` is `FLOWTAPE_ABI_VERSION`. What `out`
// points to becomes the trainer, to be freed by `flowtape_trainer_free`, or null.
//
// # Safety
// `recipe` is null or a text; `out` is null or points to a pointer.
enum FlowtapeStatus flowtape_trainer_new(uint32_t abi_version,
                                         const char *recipe,
                                         struct FlowtapeTrainer **out);

// The same on batches that the caller has: each step is given one. The recipe needs no `data`.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_without_data(uint32_t abi_version,
                                                  const char *recipe,
                                                  struct FlowtapeTrainer **out);

// The same of a model's configuration alone (the text of diffusers' `config.json`): AdamW with a constant learning rate.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_of_model(uint32_t abi_version,
                                              const char *config,
                                              double lr,
                                              struct FlowtapeTrainer **out);

// Frees a trainer; null is none.
//
// # Safety
// It was not freed, and no other thread uses it.
void flowtape_trainer_free(struct FlowtapeTrainer *trainer);

// Takes `steps` steps on the recipe's data. `metrics` (may be null) become the last one's. Cancelled, it ends after the step that is
// under way.
//
// # Safety
// `trainer` is null or a trainer; `metrics` is null or points to metrics.
enum FlowtapeStatus flowtape_trainer_step(const struct FlowtapeTrainer *trainer,
                                          uint64_t steps,
                                          struct FlowtapeMetrics *metrics);

// Takes a step on a batch: `count` tensors, of which one is `latents` and the others are what the model's adapter reads.
//
// # Safety
// `trainer` is null or a trainer, `metrics` is null or points to metrics, and the tensors are what they say.
enum FlowtapeStatus flowtape_trainer_step_on(const struct FlowtapeTrainer *trainer,
                                             const struct FlowtapeTensor *tensors,
                                             size_t count,
                                             struct FlowtapeMetrics *metrics);

// How samples are made from now on: in how many steps, and how far away from what is not asked for (1: no guidance).
//
// # Safety
// `trainer` is null or a trainer.
enum FlowtapeStatus flowtape_trainer_set_sampling(const struct FlowtapeTrainer *trainer,
                                                  size_t num_inference_steps,
                                                  double guidance_scale);

// One sample for each of `count` prompts, of a trainer on its recipe's data: pixels from about -1 to 1, `[count, C, H, W]` or
// `[count, C, F, H, W]`, `len` numbers in all. The same seed gives the same samples. Cancelled, it ends between batches.
//
// # Safety
// `trainer` is null or a trainer, `prompts` is null or points to `count` texts, `out` is null or points to `len` numbers.
enum FlowtapeStatus flowtape_trainer_generate(const struct FlowtapeTrainer *trainer,
                                              const char *const *prompts,
                                              size_t count,
                                              uint64_t seed,
                                              float *out,
                                              size_t len);

// Latents of conditions that the caller has, in the sizes of their tensor `latents`, `len` numbers in all. With guidance (see
// `flowtape_trainer_set_sampling`) it is away from `negative`, if that is given: another set of conditions, or null and 0.
//
// # Safety
// `trainer` is null or a trainer, the tensors are what they say, `out` is null or points to `len` numbers.
enum FlowtapeStatus flowtape_trainer_sample(const struct FlowtapeTrainer *trainer,
                                            const struct FlowtapeTensor *conditions,
                                            size_t count,
                                            const struct FlowtapeTensor *negative,
                                            size_t negative_count,
                                            uint64_t seed,
                                            float *out,
                                            size_t len);

// Writes a checkpoint or the weights (`content` is a `FlowtapeContent`) to a file, which is whole or not there.
//
// # Safety
// `trainer` is null or a trainer, `path` is null or a text.
enum FlowtapeStatus flowtape_trainer_save(const struct FlowtapeTrainer *trainer, uint32_t content, const char *path);

// Reads what `flowtape_trainer_save` wrote; weights may come from diffusers, too.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_load(const struct FlowtapeTrainer *trainer, uint32_t content, const char *path);

// The same to memory. `out` is to be freed by `flowtape_bytes_free`.
//
// # Safety
// `trainer` is null or a trainer, `out` is null or points to bytes.
enum FlowtapeStatus flowtape_trainer_save_to_memory(const struct FlowtapeTrainer *trainer,
                                                    uint32_t content,
                                                    struct FlowtapeBytes *out);

// The same from memory.
//
// # Safety
// `trainer` is null or a trainer, `data` is null or points to `len` bytes.
enum FlowtapeStatus flowtape_trainer_load_from_memory(const struct FlowtapeTrainer *trainer,
                                                      uint32_t content,
                                                      const uint8_t *data,
                                                      size_t len);

// Asks the call that works on a trainer, or the next one, to end early with `FLOWTAPE_STATUS_CANCELLED`. From any thread; it returns
// at once.
//
// # Safety
// `trainer` is null or a trainer.
enum FlowtapeStatus flowtape_trainer_cancel(const struct FlowtapeTrainer *trainer);

// The text of the last error of this thread, in UTF-8; empty where there was none. It stays until the thread's next call that fails.
const char *flowtape_last_error(void);

// Frees bytes that the library made; null is none.
//
// # Safety
// They are as the library gave them, and were not freed.
void flowtape_bytes_free(struct FlowtapeBytes bytes);

// A trainer of a recipe (the text of its YAML, or JSON) on the data that it names. `abi_version` is `FLOWTAPE_ABI_VERSION`. What `out`
// points to becomes the trainer, to be freed by `flowtape_trainer_free`, or null.
//
// # Safety
// `recipe` is null or a text; `out` is null or points to a pointer.
enum FlowtapeStatus flowtape_trainer_new(uint32_t abi_version,
                                         const char *recipe,
                                         struct FlowtapeTrainer **out);

// The same on batches that the caller has: each step is given one. The recipe needs no `data`.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_without_data(uint32_t abi_version,
                                                  const char *recipe,
                                                  struct FlowtapeTrainer **out);

// The same of a model's configuration alone (the text of diffusers' `config.json`): AdamW with a constant learning rate.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_of_model(uint32_t abi_version,
                                              const char *config,
                                              double lr,
                                              struct FlowtapeTrainer **out);

// Frees a trainer; null is none.
//
// # Safety
// It was not freed, and no other thread uses it.
void flowtape_trainer_free(struct FlowtapeTrainer *trainer);

// Takes `steps` steps on the recipe's data. `metrics` (may be null) become the last one's. Cancelled, it ends after the step that is
// under way.
//
// # Safety
// `trainer` is null or a trainer; `metrics` is null or points to metrics.
enum FlowtapeStatus flowtape_trainer_step(const struct FlowtapeTrainer *trainer,
                                          uint64_t steps,
                                          struct FlowtapeMetrics *metrics);

// Takes a step on a batch: `count` tensors, of which one is `latents` and the others are what the model's adapter reads.
//
// # Safety
// `trainer` is null or a trainer, `metrics` is null or points to metrics, and the tensors are what they say.
enum FlowtapeStatus flowtape_trainer_step_on(const struct FlowtapeTrainer *trainer,
                                             const struct FlowtapeTensor *tensors,
                                             size_t count,
                                             struct FlowtapeMetrics *metrics);

// How samples are made from now on: in how many steps, and how far away from what is not asked for (1: no guidance).
//
// # Safety
// `trainer` is null or a trainer.
enum FlowtapeStatus flowtape_trainer_set_sampling(const struct FlowtapeTrainer *trainer,
                                                  size_t num_inference_steps,
                                                  double guidance_scale);

// One sample for each of `count` prompts, of a trainer on its recipe's data: pixels from about -1 to 1, `[count, C, H, W]` or
// `[count, C, F, H, W]`, `len` numbers in all. The same seed gives the same samples. Cancelled, it ends between batches.
//
// # Safety
// `trainer` is null or a trainer, `prompts` is null or points to `count` texts, `out` is null or points to `len` numbers.
enum FlowtapeStatus flowtape_trainer_generate(const struct FlowtapeTrainer *trainer,
                                              const char *const *prompts,
                                              size_t count,
                                              uint64_t seed,
                                              float *out,
                                              size_t len);

// Latents of conditions that the caller has, in the sizes of their tensor `latents`, `len` numbers in all. With guidance (see
// `flowtape_trainer_set_sampling`) it is away from `negative`, if that is given: another set of conditions, or null and 0.
//
// # Safety
// `trainer` is null or a trainer, the tensors are what they say, `out` is null or points to `len` numbers.
enum FlowtapeStatus flowtape_trainer_sample(const struct FlowtapeTrainer *trainer,
                                            const struct FlowtapeTensor *conditions,
                                            size_t count,
                                            const struct FlowtapeTensor *negative,
                                            size_t negative_count,
                                            uint64_t seed,
                                            float *out,
                                            size_t len);

// Writes a checkpoint or the weights (`content` is a `FlowtapeContent`) to a file, which is whole or not there.
//
// # Safety
// `trainer` is null or a trainer, `path` is null or a text.
enum FlowtapeStatus flowtape_trainer_save(const struct FlowtapeTrainer *trainer, uint32_t content, const char *path);

// Reads what `flowtape_trainer_save` wrote; weights may come from diffusers, too.
//
// # Safety
// As above.
enum FlowtapeStatus flowtape_trainer_load(const struct FlowtapeTrainer *trainer, uint32_t content, const char *path);

// The same to memory. `out` is to be freed by `flowtape_bytes_free`.
//
// # Safety
// `trainer` is null or a trainer, `out` is null or points to bytes.
enum FlowtapeStatus flowtape_trainer_save_to_memory(const struct FlowtapeTrainer *trainer,
                                                    uint32_t content,
                                                    struct FlowtapeBytes *out);

// The same from memory.
//
// # Safety
// `trainer` is null or a trainer, `data` is null or points to `len` bytes.
enum FlowtapeStatus flowtape_trainer_load_from_memory(const struct FlowtapeTrainer *trainer,
                                                      uint32_t content,
                                                      const uint8_t *data,
                                                      size_t len);

// Asks the call that works on a trainer, or the next one, to end early with `FLOWTAPE_STATUS_CANCELLED`. From any thread; it returns
// at once.
//
// # Safety
// `trainer` is null or a trainer.
enum FlowtapeStatus flowtape_trainer_cancel(const struct FlowtapeTrainer *trainer);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLOWTAPE_H */
