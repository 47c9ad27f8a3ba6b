//! Modules, kernels and launches.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use cust::error::CudaError;
use cust::module::Module;
use cust::sys::{self, CUfunction, CUfunction_attribute};
use flowtape_engine::Result;

use super::gpu::{Failure, Gpu, checked};
use super::packed;

/// Dynamic shared memory that needs no asking for.
const SHARED: u32 = 48 << 10;
/// Names of launches that are kept.
const RECENT: usize = 4;

/// A function of a module.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    name: Arc<str>,
    function: CUfunction,
    /// Keeps the function's code loaded.
    _module: Arc<Module>,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// What a printed kernel is known by: all that its text depends on.
pub(super) type Key = Vec<u64>;

/// Loaded modules and kernels. A driver keeps what it compiled on disk, so only the first run waits for it.
#[derive(Debug, Default)]
pub(super) struct Modules {
    embedded: Mutex<HashMap<String, Arc<Module>>>,
    kernels: Mutex<HashMap<(String, String), Kernel>>,
    printed: Mutex<HashMap<Key, Kernel>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a launch takes besides its arguments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub grid: [u32; 3],
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Launch {
    /// One axis of blocks.
    pub fn blocks(count: usize, block: u32) -> Self {
        Self { grid: [count as u32, 1, 1], block, shared: 0 }
    }
}

impl Gpu {
    fn kernel(&self, module: Arc<Module>, name: &str) -> Result<Kernel, Failure> {
        let function = module.get_function(name)?.to_raw();
        Ok(Kernel { name: name.into(), function, _module: module })
    }

    /// A kernel of `kernels/`, loaded when it is first used.
    pub fn embedded(&self, module: &str, name: &str) -> Result<Kernel, Failure> {
        self.enter()?;
        let key = (module.to_owned(), name.to_owned());
        if let Some(kernel) = locked(&self.modules.kernels).get(&key) {
            return Ok(kernel.clone());
        }
        let mut modules = locked(&self.modules.embedded);
        let loaded = match modules.get(module) {
            Some(loaded) => loaded.clone(),
            None => {
                let text = packed::text(module).ok_or(CudaError::NotFound)?;
                let loaded = Arc::new(Module::from_ptx(text, &[])?);
                modules.insert(module.to_owned(), loaded.clone());
                loaded
            }
        };
        drop(modules);
        let kernel = self.kernel(loaded, name)?;
        locked(&self.modules.kernels).insert(key, kernel.clone());
        Ok(kernel)
    }

    /// The kernel of a printed text, printed and compiled when its key is new.
    pub fn printed(&self, key: Key, text: impl FnOnce() -> String) -> Result<Kernel, Failure> {
        self.enter()?;
        if let Some(kernel) = locked(&self.modules.printed).get(&key) {
            return Ok(kernel.clone());
        }
        let module = Arc::new(Module::from_ptx(text(), &[])?);
        let kernel = self.kernel(module, super::ptx::ENTRY)?;
        locked(&self.modules.printed).insert(key, kernel.clone());
        Ok(kernel)
    }

    /// Number of printed kernels.
    pub fn printed_count(&self) -> usize {
        locked(&self.modules.printed).len()
    }

    /// Enqueues a kernel with one argument, a struct. No block, no launch.
    ///
    /// # Safety
    /// The argument is what the kernel's parameter is, and all memory that the kernel then uses is its own or read
    /// by nobody else before this launch ends in the stream's order.
    pub unsafe fn launch<T: ?Sized>(&self, kernel: &Kernel, at: Launch, argument: &T) -> Result<(), Failure> {
        let Launch { grid: [x, y, z], block, shared } = at;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        self.enter()?;
        if shared > SHARED {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            checked(unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, shared as i32) })?;
        }
        let mut arguments = [std::ptr::from_ref(argument).cast::<std::ffi::c_void>().cast_mut()];
        // SAFETY: the caller's promise; the driver copies the argument before it returns.
        checked(unsafe {
            let stream = self.stream.as_inner();
            let none = std::ptr::null_mut();
            sys::cuLaunchKernel(kernel.function, x, y, z, block, 1, 1, shared, stream, arguments.as_mut_ptr(), none)
        })?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        let mut recent = locked(&self.recent);
        if recent.len() == RECENT {
            recent.remove(0);
        }
        recent.push(kernel.name.to_string());
        Ok(())
    }
}
