// A program in C that trains, samples, keeps what came of it, and does wrong what a program may do wrong.
#include "flowtape.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #what, flowtape_last_error());                              \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define OK(call) CHECK((call) == FLOWTAPE_STATUS_OK)
#define FAILS(call, part) CHECK((call) == FLOWTAPE_STATUS_ERROR && strstr(flowtape_last_error(), (part)) != NULL)

static char *read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    static char text[1 << 16];
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    return text;
}

static void *cancel(void *trainer) {
    OK(flowtape_trainer_cancel(trainer));
    return NULL;
}

// A batch as FLUX.1's adapter reads it.
static void on_batches(const char *config) {
    static float latents[4 * 64], text[4 * 3 * 32], pooled[4 * 32], out[4 * 64];
    for (int i = 0; i < 4 * 64; i++) latents[i] = 0.5f;
    for (int i = 0; i < 4 * 3 * 32; i++) text[i] = 0.1f;
    const size_t latent_dims[] = {4, 1, 8, 8}, text_dims[] = {4, 3, 32}, pooled_dims[] = {4, 32};
    FlowtapeTensor batch[] = {
        {"latents", latents, FLOWTAPE_DTYPE_F32, latent_dims, 4},
        {"text_embeddings", text, FLOWTAPE_DTYPE_F32, text_dims, 3},
        {"pooled_prompt_embeds", pooled, FLOWTAPE_DTYPE_F32, pooled_dims, 2},
    };
    FlowtapeTrainer *trainer;
    OK(flowtape_trainer_of_model(FLOWTAPE_ABI_VERSION, config, 2e-3, &trainer));
    FlowtapeMetrics first, last;
    OK(flowtape_trainer_step_on(trainer, batch, 3, &first));
    for (int i = 0; i < 40; i++) OK(flowtape_trainer_step_on(trainer, batch, 3, &last));
    CHECK(last.step == 41 && last.loss < 0.7 * first.loss);
    OK(flowtape_trainer_set_sampling(trainer, 4, 1.0));
    OK(flowtape_trainer_sample(trainer, batch, 3, NULL, 0, 1, out, 4 * 64));
    float mean = 0;
    for (int i = 0; i < 4 * 64; i++) mean += out[i] / (4 * 64);
    CHECK(mean > 0.2f && mean < 0.8f);
    // Wrong batches.
    FAILS(flowtape_trainer_step_on(trainer, NULL, 3, NULL), "batch: expected a pointer, got null");
    FAILS(flowtape_trainer_step_on(trainer, batch + 1, 2, NULL), "expected a tensor `latents`, got [pooled_prompt_embeds, text_embeddings]");
    FAILS(flowtape_trainer_step_on(trainer, batch, 1, NULL), "text_embeddings");
    FlowtapeTensor wrong[3];
    memcpy(wrong, batch, sizeof wrong);
    wrong[1].dtype = 77;
    FAILS(flowtape_trainer_step_on(trainer, wrong, 3, NULL), "got 77");
    memcpy(wrong, batch, sizeof wrong);
    const size_t huge[] = {(size_t)1 << 40, (size_t)1 << 40, 2, 2};
    wrong[0].dims = huge;
    FAILS(flowtape_trainer_step_on(trainer, wrong, 3, NULL), "more than the address space");
    const size_t flat[] = {4, 64};
    wrong[0].dims = flat, wrong[0].rank = 2;
    FAILS(flowtape_trainer_step_on(trainer, wrong, 3, NULL), "[4, 64]");
    memcpy(wrong, batch, sizeof wrong);
    wrong[1].data = NULL;
    FAILS(flowtape_trainer_step_on(trainer, wrong, 3, NULL), "text_embeddings: data: expected a pointer, got null");
    wrong[1] = batch[0];
    FAILS(flowtape_trainer_step_on(trainer, wrong, 3, NULL), "latents is there twice");
    FAILS(flowtape_trainer_sample(trainer, batch, 3, NULL, 0, 1, out, 5), "room for 256 numbers, got 5");
    FAILS(flowtape_trainer_step(trainer, 1, NULL), "");
    // After all that it goes on.
    OK(flowtape_trainer_step_on(trainer, batch, 3, &last));
    CHECK(last.step == 42);
    flowtape_trainer_free(trainer);
}

int main(int count, char **args) {
    CHECK(count == 4);
    const char *recipe = read_file(args[1]), *folder = args[3];
    CHECK(flowtape_abi_version() == FLOWTAPE_ABI_VERSION && *flowtape_last_error() == 0);
    FlowtapeTrainer *trainer = (FlowtapeTrainer *)1, *other;
    FAILS(flowtape_trainer_new(FLOWTAPE_ABI_VERSION + 1, recipe, &trainer), "the header is of ABI version 2, the library of version 1");
    FAILS(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, NULL, &trainer), "recipe: expected a pointer, got null");
    CHECK(trainer == NULL);
    FAILS(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, recipe, NULL), "out: expected a pointer, got null");
    FAILS(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, "optimizer: {lr: fast}", &trainer), "optimizer.lr");
    FAILS(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, "\xff", &trainer), "UTF-8");
    FAILS(flowtape_trainer_step(NULL, 1, NULL), "trainer: expected a pointer, got null");
    FAILS(flowtape_trainer_cancel(NULL), "trainer: expected a pointer, got null");

    OK(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, recipe, &trainer));
    OK(flowtape_trainer_new(FLOWTAPE_ABI_VERSION, recipe, &other));
    FlowtapeMetrics metrics, again;
    OK(flowtape_trainer_step(trainer, 3, &metrics));
    CHECK(metrics.step == 3 && metrics.loss > 0.1 && metrics.loss < 10 && metrics.lr > 0 && metrics.grad_norm > 0);
    // From memory, from a file, and weights alone: what goes on is the same.
    FlowtapeBytes kept, weights, same;
    OK(flowtape_trainer_save_to_memory(trainer, FLOWTAPE_CONTENT_CHECKPOINT, &kept));
    OK(flowtape_trainer_load_from_memory(other, FLOWTAPE_CONTENT_CHECKPOINT, kept.data, kept.len));
    OK(flowtape_trainer_step(trainer, 2, &metrics));
    OK(flowtape_trainer_step(other, 2, &again));
    CHECK(again.step == 5 && again.loss == metrics.loss && again.grad_norm == metrics.grad_norm);
    char path[4096];
    snprintf(path, sizeof path, "%s/weights.safetensors", folder);
    OK(flowtape_trainer_save(trainer, FLOWTAPE_CONTENT_WEIGHTS, path));
    OK(flowtape_trainer_save_to_memory(trainer, FLOWTAPE_CONTENT_WEIGHTS, &weights));
    OK(flowtape_trainer_step(other, 1, NULL));
    OK(flowtape_trainer_load(other, FLOWTAPE_CONTENT_WEIGHTS, path));
    OK(flowtape_trainer_save_to_memory(other, FLOWTAPE_CONTENT_WEIGHTS, &same));
    CHECK(same.len == weights.len && memcmp(same.data, weights.data, same.len) == 0);
    FAILS(flowtape_trainer_load_from_memory(other, FLOWTAPE_CONTENT_CHECKPOINT, weights.data, weights.len), "weights alone");
    FAILS(flowtape_trainer_load_from_memory(other, 9, weights.data, weights.len), "got 9");
    FAILS(flowtape_trainer_load_from_memory(other, FLOWTAPE_CONTENT_WEIGHTS, kept.data, 40), "not a whole safetensors file");
    FAILS(flowtape_trainer_load(other, FLOWTAPE_CONTENT_WEIGHTS, "/no/such/file"), "/no/such/file");
    FAILS(flowtape_trainer_save(other, FLOWTAPE_CONTENT_WEIGHTS, "/no/such/file"), "/no/such/file");
    flowtape_bytes_free(kept), flowtape_bytes_free(weights), flowtape_bytes_free(same);

    // Samples, with a guidance of the caller's.
    const char *prompts[] = {"a handwritten three", "a handwritten seven"};
    static float pixels[2 * 64];
    OK(flowtape_trainer_set_sampling(trainer, 2, 3.0));
    OK(flowtape_trainer_generate(trainer, prompts, 2, 7, pixels, 2 * 64));
    CHECK(pixels[0] != pixels[64]);
    FAILS(flowtape_trainer_generate(trainer, prompts, 2, 7, pixels, 64), "room for 128 numbers, got 64");
    prompts[1] = "a handwritten hat";
    FAILS(flowtape_trainer_generate(trainer, prompts, 2, 7, pixels, 2 * 64), "hat");
    FAILS(flowtape_trainer_set_sampling(trainer, 0, 3.0), "num_inference_steps");

    // Another thread ends a call that would take days.
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, cancel, trainer) == 0);
    CHECK(flowtape_trainer_step(trainer, 1000000000, &metrics) == FLOWTAPE_STATUS_CANCELLED);
    CHECK(pthread_join(thread, NULL) == 0);
    OK(flowtape_trainer_step(trainer, 1, &again));
    flowtape_trainer_free(trainer), flowtape_trainer_free(other), flowtape_trainer_free(NULL);
    on_batches(read_file(args[2]));
    puts("done");
    return 0;
}
