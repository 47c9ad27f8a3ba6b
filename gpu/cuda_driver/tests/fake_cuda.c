// A libcuda.so.1 for tests: it loads, counts devices and answers as the environment says, and computes nothing.
//
//   FAKE_CUDA_INIT     what cuInit returns (0)
//   FAKE_CUDA_VERSION  what cuDriverGetVersion gives (13000)
//   FAKE_CUDA_DEVICES  number of devices (1)
//   FAKE_CUDA_MAJOR    major compute capability (9)
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return flags ? 1 : setting("FAKE_CUDA_INIT", 0); }

int cuDriverGetVersion(int *version) {
    *version = setting("FAKE_CUDA_VERSION", 13000);
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = setting("FAKE_CUDA_DEVICES", 1);
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < setting("FAKE_CUDA_DEVICES", 1) ? 0 : 101;
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "Fake GPU %d", device);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)(80 + device) << 30;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? setting("FAKE_CUDA_MAJOR", 9) : attribute == 16 ? 132 : 0;
    return 0;
}

// A context can't be made: CUDA_ERROR_DEVICE_UNAVAILABLE, which CUDA 11.4 does not know by this number.
int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = NULL;
    return 46;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 46 ? "CUDA-capable device(s) is/are busy or unavailable" : "fake";
    return code == 999 ? 1 : 0;
}

// Newer than cust_raw: adds, so that a test sees that it was called.
int cuFakeAdd(int a, int b) { return a + b; }
