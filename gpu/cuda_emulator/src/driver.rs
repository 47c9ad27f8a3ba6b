//! The driver's functions, as far as Flowtape calls them.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use crate::machine::{Allocations, launch};
use crate::parse::{Kernel, Module};

/// What the emulated driver is, and how it fails.
#[derive(Clone, Debug)]
pub struct Settings {
    /// As `cuDriverGetVersion` gives it.
    pub version: c_int,
    /// Number of devices.
    pub devices: c_int,
    /// Compute capability.
    pub capability: (c_int, c_int),
    /// Bytes of each device.
    pub memory: usize,
    /// Whether there is stream-ordered allocation.
    pub ordered: bool,
    /// The code with which the next launch fails: seen at the next call that waits.
    pub fails: c_int,
    /// Whether launches run; else they are counted alone.
    pub runs: bool,
}

impl Default for Settings {
    /// CUDA 13.0 and one device of capability 8.0 with 16 GiB, on which all goes well.
    fn default() -> Self {
        Self { version: 13_000, devices: 1, capability: (8, 0), memory: 16 << 30, ordered: true, fails: 0, runs: true }
    }
}

/// What was asked of the emulated driver so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Bytes that are allocated.
    pub allocated: usize,
    /// Blocks that are allocated.
    pub blocks: usize,
    /// Allocations so far.
    pub allocations: usize,
    /// Launches so far.
    pub launches: usize,
    /// Modules that are loaded.
    pub modules: usize,
    /// Bytes of pinned host memory.
    pub pinned: usize,
}

struct Function {
    name: String,
    kernel: Arc<Kernel>,
    dynamic: usize,
}

struct State {
    settings: Settings,
    usage: Usage,
    memory: Allocations,
    pinned: HashMap<usize, usize>,
    modules: HashMap<usize, Module>,
    functions: Vec<Function>,
    launched: HashMap<(ThreadId, String), usize>,
    next: usize,
    /// After a failed launch each call that waits or launches gives this code.
    failed: c_int,
    complaint: String,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

struct Held(MutexGuard<'static, Option<State>>);

impl std::ops::Deref for Held {
    type Target = State;
    fn deref(&self) -> &State {
        self.0.as_ref().expect("made when held")
    }
}

impl std::ops::DerefMut for Held {
    fn deref_mut(&mut self) -> &mut State {
        self.0.as_mut().expect("made when held")
    }
}

fn state() -> Held {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    state.get_or_insert_with(|| State {
        settings: Settings::default(),
        usage: Usage::default(),
        memory: Allocations::new(),
        pinned: HashMap::new(),
        modules: HashMap::new(),
        functions: Vec::new(),
        launched: HashMap::new(),
        next: 1,
        failed: 0,
        complaint: String::new(),
    });
    Held(state)
}

/// Lets this machine answer in place of the CUDA driver, in the whole process. Returns `false` when the driver was
/// asked for before, by something else.
pub fn install() -> bool {
    static ONCE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: each function below has the signature that `cust_raw` declares under its name.
    *ONCE.get_or_init(|| unsafe { flowtape_cuda_driver::provide(table) })
}

/// The same, but only where there is no CUDA driver. Returns whether this machine answers.
pub fn stand_in() -> bool {
    static ONCE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: as in `install`.
    *ONCE.get_or_init(|| unsafe { flowtape_cuda_driver::stand_in(table) })
}

/// Changes the settings. A failure that was seen is forgotten.
pub fn set(change: impl FnOnce(&mut Settings)) {
    let mut state = state();
    state.failed = 0;
    change(&mut state.settings);
}

/// What was asked so far.
pub fn usage() -> Usage {
    let state = state();
    Usage { modules: state.modules.len(), blocks: state.memory.len(), ..state.usage }
}

/// Launches so far of the kernels of a name by this thread: tests that run beside it do not count.
pub fn launched(name: &str) -> usize {
    state().launched.get(&(std::thread::current().id(), name.to_owned())).copied().unwrap_or(0)
}

/// What was last found wrong with a text or a running kernel.
pub fn complaint() -> String {
    state().complaint.clone()
}

/// Writes a text to the folder that `FLOWTAPE_PTX` names, once: for a real assembler to read.
fn keep(text: &str) {
    let Some(folder) = std::env::var_os("FLOWTAPE_PTX").filter(|f| !f.is_empty()) else { return };
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let path = std::path::Path::new(&folder).join(format!("{:016x}.ptx", hasher.finish()));
    std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

const LAYOUT: usize = 256;

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), LAYOUT).expect("a size of memory")
}

unsafe fn allocate(address: *mut u64, bytes: usize) -> c_int {
    let mut state = state();
    if state.usage.allocated.saturating_add(bytes) > state.settings.memory {
        return 2;
    }
    // SAFETY: the layout is not empty; the caller gives a writable address.
    unsafe {
        let block = alloc(layout(bytes));
        // Not yet written: NaN in every float.
        block.write_bytes(0xff, bytes);
        *address = block as u64;
    }
    // SAFETY: just written.
    state.memory.insert(unsafe { *address }, bytes);
    state.usage.allocated += bytes;
    state.usage.allocations += 1;
    0
}

fn release(address: u64) -> c_int {
    let mut state = state();
    let Some(bytes) = state.memory.remove(&address) else { return 1 };
    state.usage.allocated -= bytes;
    // SAFETY: it came from `allocate` with this size, and is given back once.
    unsafe { dealloc(address as *mut u8, layout(bytes)) };
    0
}

/// Whether a range lies in one block; else the code for an invalid value.
fn inside(state: &State, address: u64, bytes: usize) -> bool {
    let block = state.memory.range(..=address).next_back();
    block.is_some_and(|(start, size)| address + bytes as u64 <= start + *size as u64)
}

macro_rules! functions {
    ($($name:ident($($arg:ident: $t:ty),*) $body:block)*) => {
        mod functions {
            #![allow(non_snake_case)]
            use super::*;
            $(pub(super) unsafe extern "C" fn $name($($arg: $t),*) -> c_int $body)*
        }

        fn table(name: &str) -> *mut c_void {
            match name {
                $(stringify!($name) => functions::$name as *mut c_void,)*
                _ => std::ptr::null_mut(),
            }
        }
    };
}

// SAFETY of each: pointers are those that the caller of the driver's function gives, valid as the driver's
// documentation asks.
#[allow(clippy::undocumented_unsafe_blocks)]
mod answers {
    use super::*;
    functions! {
        cuInit(_flags: c_uint) { 0 }
        cuDriverGetVersion(version: *mut c_int) {
            unsafe { *version = state().settings.version };
            0
        }
        cuDeviceGetCount(count: *mut c_int) {
            unsafe { *count = state().settings.devices };
            0
        }
        cuDeviceGet(device: *mut c_int, ordinal: c_int) {
            unsafe { *device = ordinal };
            if ordinal < state().settings.devices { 0 } else { 101 }
        }
        cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) {
            let text = c"emulated GPU".to_bytes_with_nul();
            let count = text.len().min(length as usize);
            unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, count) };
            0
        }
        cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) {
            unsafe { *bytes = state().settings.memory };
            0
        }
        cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
            let settings = state().settings.clone();
            let answer = match attribute {
                75 => settings.capability.0,
                76 => settings.capability.1,
                16 => 1,
                115 => c_int::from(settings.ordered),
                _ => 0,
            };
            unsafe { *value = answer };
            0
        }
        cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
            unsafe { *context = std::ptr::without_provenance_mut(16) };
            0
        }
        cuDevicePrimaryCtxRelease_v2(_device: c_int) { 0 }
        cuCtxSetCurrent(_context: *mut c_void) { 0 }
        cuStreamCreateWithPriority(stream: *mut *mut c_void, _flags: c_uint, _priority: c_int) {
            unsafe { *stream = std::ptr::without_provenance_mut(32) };
            0
        }
        cuStreamDestroy_v2(_stream: *mut c_void) { 0 }
        cuStreamSynchronize(_stream: *mut c_void) { state().failed }
        cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
            unsafe { *event = std::ptr::without_provenance_mut(48) };
            0
        }
        cuEventRecord(_event: *mut c_void, _stream: *mut c_void) { state().failed }
        cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: c_uint) { state().failed }
        cuEventSynchronize(_event: *mut c_void) { state().failed }
        cuEventDestroy_v2(_event: *mut c_void) { 0 }
        cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: *mut c_void) {
            match state().failed {
                0 => {}
                code => return code,
            }
            unsafe { allocate(address, bytes) }
        }
        cuMemFreeAsync(address: u64, _stream: *mut c_void) { release(address) }
        cuMemAlloc_v2(address: *mut u64, bytes: usize) { unsafe { allocate(address, bytes) } }
        cuMemFree_v2(address: u64) { release(address) }
        cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
            let state = state();
            unsafe {
                *free = state.settings.memory.saturating_sub(state.usage.allocated);
                *total = state.settings.memory;
            }
            0
        }
        cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, _device: c_int) {
            unsafe { *pool = std::ptr::without_provenance_mut(64) };
            0
        }
        cuMemPoolSetAttribute(_pool: *mut c_void, _attribute: c_int, _value: *mut c_void) { 0 }
        cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) {
            let block = unsafe { alloc(layout(bytes)) };
            unsafe { *address = block.cast() };
            let mut state = state();
            state.pinned.insert(block as usize, bytes);
            state.usage.pinned += bytes;
            0
        }
        cuMemFreeHost(address: *mut c_void) {
            let mut state = state();
            let Some(bytes) = state.pinned.remove(&(address as usize)) else { return 1 };
            state.usage.pinned -= bytes;
            unsafe { dealloc(address.cast(), layout(bytes)) };
            0
        }
        cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, _stream: *mut c_void) {
            let state = state();
            if state.failed != 0 || !inside(&state, to, bytes) {
                return state.failed.max(1);
            }
            unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, bytes) };
            0
        }
        cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, _stream: *mut c_void) {
            let state = state();
            if state.failed != 0 || !inside(&state, from, bytes) {
                return state.failed.max(1);
            }
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast::<u8>(), bytes) };
            0
        }
        cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: *mut c_void) {
            let state = state();
            if state.failed != 0 || !inside(&state, from, bytes) || !inside(&state, to, bytes) {
                return state.failed.max(1);
            }
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            0
        }
        cuMemsetD32Async(to: u64, value: c_uint, count: usize, _stream: *mut c_void) {
            let state = state();
            if state.failed != 0 || !inside(&state, to, 4 * count) {
                return state.failed.max(1);
            }
            for i in 0..count {
                unsafe { (to as *mut c_uint).add(i).write(value) };
            }
            0
        }
        cuModuleLoadDataEx(
            module: *mut *mut c_void, image: *const c_void, _count: c_uint, _options: *mut c_int,
            _values: *mut *mut c_void
        ) {
            let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy().into_owned();
            keep(&text);
            let parsed = Module::parse(&text);
            let mut state = state();
            match parsed {
                Ok(parsed) => {
                    let handle = state.next;
                    state.next += 1;
                    state.modules.insert(handle, parsed);
                    unsafe { *module = std::ptr::without_provenance_mut(handle) };
                    0
                }
                Err(complaint) => {
                    eprintln!("PTX is not known here: {complaint}");
                    state.complaint = complaint;
                    218
                }
            }
        }
        cuModuleUnload(module: *mut c_void) {
            state().modules.remove(&module.addr());
            0
        }
        cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) {
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            let mut state = state();
            let kernel = state.modules.get(&module.addr()).and_then(|m| m.kernels.get(&name)).cloned();
            let Some(kernel) = kernel else { return 500 };
            state.functions.push(Function { name, kernel, dynamic: 48 << 10 });
            unsafe { *function = std::ptr::without_provenance_mut(state.functions.len()) };
            0
        }
        cuFuncSetAttribute(function: *mut c_void, attribute: c_int, value: c_int) {
            // The most dynamic shared memory, of what every device of capability 8.0 or more has.
            if attribute != 8 || value > 99 << 10 {
                return 1;
            }
            state().functions[function.addr() - 1].dynamic = value as usize;
            0
        }
        cuLaunchKernel(
            function: *mut c_void, x: c_uint, y: c_uint, z: c_uint, threads: c_uint, _height: c_uint, _depth: c_uint,
            shared: c_uint, _stream: *mut c_void, arguments: *mut *mut c_void, _extra: *mut *mut c_void
        ) {
            let mut state = state();
            if state.failed != 0 {
                return state.failed;
            }
            let function = &state.functions[function.addr() - 1];
            let kernel = function.kernel.clone();
            let fits = threads <= kernel.most_threads && shared as usize <= function.dynamic && x < 1 << 31
                && y <= 65_535 && z <= 65_535 && x > 0 && y > 0 && z > 0;
            if !fits {
                return 1;
            }
            let name = function.name.clone();
            *state.launched.entry((std::thread::current().id(), name)).or_default() += 1;
            state.usage.launches += 1;
            if state.settings.fails != 0 {
                state.failed = std::mem::take(&mut state.settings.fails);
                return 0;
            }
            if !state.settings.runs {
                return 0;
            }
            let parameter = unsafe { std::slice::from_raw_parts((*arguments).cast::<u8>(), kernel.parameter) }.to_vec();
            let memory = std::mem::take(&mut state.memory);
            let ended = launch(&kernel, &parameter, [x, y, z], threads, shared as usize, &memory);
            state.memory = memory;
            if let Err(complaint) = ended {
                eprintln!("a kernel failed: {complaint}");
                state.complaint = complaint;
                state.failed = 700;
            }
            0
        }
        cuGetErrorString(code: c_int, text: *mut *const c_char) {
            let words = match code {
                1 => c"invalid argument",
                2 => c"out of memory",
                101 => c"invalid device ordinal",
                218 => c"a PTX JIT compilation failed",
                700 => c"an illegal memory access was encountered",
                719 => c"unspecified launch failure",
                _ => c"an error",
            };
            unsafe { *text = words.as_ptr() };
            0
        }
    }
    pub(super) fn answer(name: &str) -> *mut c_void {
        table(name)
    }
}

use answers::answer as table;
