/* Lets torch's autograd engine run over fake CUDA tensors on a machine without a GPU.

   Loaded before torch, and in place of the driver (libcuda.so.1): torch sees `num_fake_gpus` GPUs, and the one function
   of the driver that the engine calls says that none of them is in use. */
int num_fake_gpus = 0;

signed char _ZN3c104cuda12device_countEv(void) { return (signed char)num_fake_gpus; } /* c10::cuda::device_count() */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    (void)device;
    *flags = 0;
    *active = 0;
    return 0; /* CUDA_SUCCESS */
}
