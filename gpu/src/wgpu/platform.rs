//! What differs where a browser is the machine: how the host waits for a device, and how it hears of errors.

#[cfg(all(target_arch = "wasm32", target_os = "unknown"))]
pub(super) use self::browser::{guarded, wait};
#[cfg(not(all(target_arch = "wasm32", target_os = "unknown")))]
pub(super) use self::system::{guarded, wait};

#[cfg(not(all(target_arch = "wasm32", target_os = "unknown")))]
mod system {
    use ::wgpu::{Device, Error, ErrorFilter};
    use flowtape_engine::Result;

    /// What comes of a future: wgpu's are ready at once, or as soon as the device was polled.
    pub fn wait<T: 'static>(future: impl Future<Output = T> + 'static) -> Result<T> {
        Ok(pollster::block_on(future))
    }

    /// What `work` makes, and the first error of these kinds that it meets.
    pub fn guarded<T>(device: &Device, kinds: &[ErrorFilter], work: impl FnOnce() -> T) -> (T, Option<Error>) {
        let scopes: Vec<_> = kinds.iter().map(|kind| device.push_error_scope(*kind)).collect();
        let made = work();
        // Each scope is popped, whatever the others say.
        let errors = scopes.into_iter().rev().map(|scope| pollster::block_on(scope.pop()));
        (made, errors.fold(None, Option::or))
    }
}

#[cfg(all(target_arch = "wasm32", target_os = "unknown"))]
#[expect(deprecated, reason = "js-sys marks JSPI so, which may still change")]
mod browser {
    use std::cell::Cell;
    use std::rc::Rc;

    use ::wgpu::{Device, Error, ErrorFilter};
    use flowtape_engine::Result;
    use js_sys::futures::{future_to_promise, jspi_block_on_promise};
    use js_sys::wasm_bindgen::JsValue;

    use super::super::queue::failed;

    /// What comes of a future, for which WebAssembly is suspended (JSPI): the page's script goes on meanwhile, and must not call in.
    ///
    /// # Errors
    /// When JavaScript called in without a promise for the answer, so that there is nothing to suspend.
    pub fn wait<T: 'static>(future: impl Future<Output = T> + 'static) -> Result<T> {
        let told = Rc::new(Cell::new(None));
        let to = told.clone();
        let done = future_to_promise(async move {
            to.set(Some(future.await));
            Ok(JsValue::UNDEFINED)
        });
        let waited = jspi_block_on_promise(&done);
        let value = waited.ok().and_then(|_| told.take());
        value.ok_or_else(|| failed("wgpu", "WebAssembly cannot be suspended here to wait for it (JSPI)"))
    }

    /// What `work` makes. Its errors are told later, to the device's handler ([`Gpu::check`](super::super::queue::Gpu::check)): asking
    /// for them would be a wait for each buffer and each kernel, more than a thousand before the first step's end.
    pub fn guarded<T>(_: &Device, _: &[ErrorFilter], work: impl FnOnce() -> T) -> (T, Option<Error>) {
        (work(), None)
    }
}
